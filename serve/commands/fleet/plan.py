"""`serve plan`: how many machines hold an objective at a rate."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadtest.plan.options import Number, Share
from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting
from modelathe.errors import BadInput, UsageError
from serve.commands.versions import meant
from serve.planning import BALANCERS

if TYPE_CHECKING:
    from serve.planning.arrivals import Arrivals
    from serve.simulate.configuration import Configuration
    from serve.simulate.curve_file import Measured

FASTEST = 1e9


def _where(context: click.Context, option: click.Parameter, named: Path | None) -> Path | None:
    """Return the repository, which is looked for only where a model is named."""
    return meant(context, option, named) if context.params.get("model") else named


@click.command()
@click.argument("model", required=False, is_eager=True)
@click.option("--measured", type=PATH, required=True, help="The times of MODEL's calls, as `serve tune` writes them.")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@click.option("--rate", type=Number(0, FASTEST, min_open=True), help="Requests per second.  [default: the trace's]")
@click.option("--arrival", help="How they follow each other: poisson, uniform or gamma:CV.  [default: poisson]")
@click.option("--trace", type=PATH, help="Recorded traffic instead, as `loadtest run --trace` takes it.")
@click.option("--balance", type=click.Choice(BALANCERS), default="random", show_default=True, help="What spreads them.")
@click.option("--clients", type=click.IntRange(1, 10**7), default=1000, show_default=True, help="That pin connections.")
@click.option("--fail", type=click.IntRange(0, 1000), default=1, show_default=True, help="Replicas that may be lost.")
@click.option("--zones", type=click.IntRange(2, 100), help="Zones, one of which may be lost.")
@click.option("--unavailable", type=click.IntRange(0, 1000), default=0, help="Replicas that an update takes away.")
@click.option(
    "--start-seconds", type=Number(0, min_open=True), help="Until a new replica answers.  [default: measured]"
)
@click.option("--growth", type=Share(), default="10%", show_default=True, help="Of the traffic in a minute.")
@click.option("--machines", type=PATH, help="A list of prices: [[machine]] with name, cores and price (for an hour).")
@click.option("--machine", default="", help="Which of them was measured.  [default: as the measured file says]")
@click.option("--repository", type=PATH, callback=_where, help="Where MODEL's configuration is read.")
@click.option(
    "--requests", type=click.IntRange(10_000, 10**8), default=1_000_000, show_default=True, help="To simulate."
)
@click.option("--most", type=click.IntRange(1, 10**6), default=100_000, show_default=True, help="Replicas to try.")
@click.option("--page", type=PATH, help="An HTML file that shows the plan.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@quiet_option
@json_option
def plan(
    model: str | None,
    measured: Path,
    slo: str,
    rate: float | None,
    arrival: str | None,
    trace: Path | None,
    balance: str,
    clients: int,
    fail: int,
    zones: int | None,
    unavailable: int,
    start_seconds: float | None,
    growth: float,
    machines: Path | None,
    machine: str,
    repository: Path | None,
    requests: int,
    most: int,
    page: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Say how many replicas hold an objective at a rate, with what headroom, and what they cost.

    Many replicas behind a balancer are simulated, with times of a call that were measured. The configuration is that
    of MODEL in the repository, or what it was measured with. Nothing is started. Ends with 3 where no number holds.

    \b
    Example:
      serve plan --measured digits.json --rate 50000 \\
          --slo "p99 < 20ms" --zones 3 --machines prices.toml
    """
    from rich.console import Console

    from serve.planning import objective, prices, report
    from serve.planning import page as pages
    from serve.planning.balancers import Balancer
    from serve.planning.cases import Asked
    from serve.planning.fleet import Fleet
    from serve.planning.plan import Wanted, make
    from serve.simulate import curve_file

    wanted_slo = objective.parse(slo)
    arrivals, asked_rate = _traffic(arrival, trace, rate, wanted_slo.requests)
    times = curve_file.read(measured)
    priced = prices.chosen(prices.read(machines), times, machine, machines) if machines else None
    configuration, name, notes = _configuration(model, repository, times, measured)
    start = times.start if start_seconds is None else start_seconds
    asked = Asked(fail, zones or 0, unavailable, start)
    fleet = Fleet(times.curve(), configuration, wanted_slo, arrivals, Balancer(balance, clients), requests, seed)
    with reporting(as_json) as tell:
        found = make(fleet, Wanted(asked_rate, asked, growth, most), tell)
    found["machine"] = priced.name if priced else machine or times.machine or None
    found["cost"] = prices.cost(priced, times, found["replicas"], asked_rate) if priced else None
    found["notes"] = [*notes, *found["notes"]]
    values = document(model=name, **found)
    if page:
        pages.write(values, page)
    if as_json:
        emit(values)
    else:
        Console().print(report.text(values))


def _traffic(arrival: str | None, trace: Path | None, rate: float | None, least: int) -> "tuple[Arrivals, float]":
    """Return how requests arrive, and how many in a second."""
    from serve.planning import arrivals

    if trace is None:
        if rate is None:
            raise UsageError("no rate was given", fix="say --rate, as in --rate 50000, or --trace FILE")
        return arrivals.parse(arrival or "poisson"), rate
    if arrival is not None:
        raise UsageError("--arrival and --trace both say how requests follow each other", fix="leave one away")
    found = arrivals.read(trace, least)
    return found, rate or found.rate or 0.0


def _configuration(
    model: str | None, repository: Path | None, times: "Measured", where: Path
) -> "tuple[Configuration, str, list[str]]":
    """Return the configuration to plan with, the model's name, and what does not fit the measured times."""
    from serve.planning import served
    from serve.repository import tree

    if model is None or repository is None:
        if times.configuration is None:
            raise BadInput("does not say what the model was served with", where=str(where), fix="name MODEL too")
        return times.configuration, times.model, []
    if times.model != model:
        raise BadInput(f"holds the times of {times.model!r}, not of {model!r}", where=str(where), fix="measure it")
    found = served.configuration(tree.config(repository, model))
    notes = []
    for what in ("threads", "instances") if times.configuration else ():
        was, now = getattr(times.configuration, what), getattr(found, what)
        if was != now:
            notes.append(
                f"measured with {what} = {was}, served with {now}: the times are not those of this configuration"
            )
    return found, model, notes
