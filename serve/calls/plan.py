"""`serve.plan`, which the command `serve plan` calls too."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import click

from loadtest.calls import keywords
from loadtest.calls.keywords import Place
from loadtest.plan.options import Number, Share
from modelathe.commandline import PATH, document, reporting
from modelathe.errors import BadInput, UsageError
from modelathe.notebook import Result, View
from serve.planning import BALANCERS

if TYPE_CHECKING:
    from serve.planning.arrivals import Arrivals
    from serve.simulate.configuration import Configuration
    from serve.simulate.curve_file import Measured

FASTEST = 1e9
Many = click.IntRange(0, 1000)
OPTIONS: dict[str, tuple[click.ParamType[Any], Any]] = {
    "rate": (Number(0, FASTEST, min_open=True), None),
    "arrival": (click.STRING, None),
    "trace": (PATH, None),
    "balance": (click.Choice(BALANCERS), "random"),
    "clients": (click.IntRange(1, 10**7), 1000),
    "fail": (Many, 1),
    "zones": (click.IntRange(2, 100), None),
    "unavailable": (Many, 0),
    "start_seconds": (Number(0, min_open=True), None),
    "growth": (Share(), "10%"),
    "machines": (PATH, None),
    "machine": (click.STRING, ""),
    "requests": (click.IntRange(10_000, 10**8), 1_000_000),
    "most": (click.IntRange(1, 10**6), 100_000),
    "page": (PATH, None),
    "seed": (click.IntRange(0), 0),
}
"""The type and the default of each option, of the command too."""


class PlanOptions(TypedDict, total=False):
    """The options of the command `serve plan`."""

    rate: float
    arrival: str
    trace: Place
    balance: Literal["random", "round-robin", "least-loaded", "pinned"]
    clients: int
    fail: int
    zones: int
    unavailable: int
    start_seconds: float
    growth: float | str
    machines: Place
    machine: str
    requests: int
    most: int
    page: Place
    seed: int


@dataclass(frozen=True, kw_only=True)
class Planned(Result):
    """How many replicas there should be.

    Args:
        replicas: with those that may be gone.
        smallest: that hold the objective.
        headroom: the highest rate that `replicas` hold, over the asked one.
        per_pod_rate: requests per second at which an autoscaler should hold each; None where nobody said how long a new
            one takes to start.
        per_million: the cost of a million requests; None without prices.
    """

    replicas: int
    smallest: int
    headroom: float
    per_pod_rate: float | None
    per_million: float | None

    def view(self) -> View:
        """Return the plan in a line, and what follows from it."""
        from serve.planning import report

        told = dict(line.partition(": ")[::2] for line in report.lines(self.document))
        return View(report.headline(self.document), told, self.document["notes"])


def plan(
    model: str = "",
    *,
    measured: Place,
    slo: str,
    repository: Place = "model_repository",
    quiet: bool = False,
    **options: Unpack[PlanOptions],
) -> Planned:
    """Say how many replicas hold an objective at a rate, with what headroom, and what they cost; nothing is started.

    Args:
        model: whose configuration in the repository is planned with; without it, what the times were measured with.
        measured: the file of times, as `serve tune` writes it.
        slo: what must hold, as `p99 < 20ms, errors < 0.1%`.
        repository: where the model is.
        quiet: say nothing while it goes on.
        options: those of the command, with underscores: `rate=50000`, `zones=3`, `machines="prices.toml"`.

    Raises:
        UsageError: a wrong objective or option, or no rate.
        BadInput: a file that does not hold what it should, or a model that is not planned.
        Refused: no number of replicas holds the objective; the nearest misses are its `partial`.
    """
    keywords.check(options, PlanOptions.__annotations__)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    read = {
        key: default if given.get(key, default) is None else keywords.converted(key, given.get(key, default), kind)
        for key, (kind, default) in OPTIONS.items()
    }
    values = _planned(model, Path(measured), slo, Path(repository), {**read, "quiet": quiet})
    cost = values["cost"]
    return Planned(
        document=values,
        replicas=values["replicas"],
        smallest=values["smallest"]["replicas"],
        headroom=values["planned"]["headroom"]["ratio"],
        per_pod_rate=values["per_pod_rate"],
        per_million=cost["per_million"] if cost else None,
    )


def _planned(model: str, measured: Path, slo: str, repository: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Return the document, and write the page if there is to be one."""
    from serve.planning import objective, page, prices
    from serve.planning.cases import Asked
    from serve.planning.engines.balancers import Balancer
    from serve.planning.fleet import Fleet
    from serve.planning.plan import Wanted, make
    from serve.simulate import curve_file

    wanted = objective.parse(slo)
    arrivals, rate = _traffic(said["arrival"], said["trace"], said["rate"], wanted.requests)
    times = curve_file.read(measured)
    listed, machine = said["machines"], said["machine"]
    priced = prices.chosen(prices.read(listed), times, machine, listed) if listed else None
    configuration, name, notes = _configuration(model, repository, times, measured)
    start = times.start if said["start_seconds"] is None else said["start_seconds"]
    asked = Asked(said["fail"], said["zones"] or 0, said["unavailable"], start)
    balancer = Balancer(said["balance"], said["clients"])
    fleet = Fleet(times.curve(), configuration, wanted, arrivals, balancer, said["requests"], said["seed"])
    with reporting(said["quiet"]) as tell:
        found = make(fleet, Wanted(rate, asked, said["growth"], said["most"]), tell)
    found["machine"] = priced.name if priced else machine or times.machine or None
    found["cost"] = prices.cost(priced, times, found["replicas"], rate) if priced else None
    found["notes"] = [*notes, *found["notes"]]
    values = document(model=name, **found)
    if said["page"]:
        page.write(values, said["page"])
    return values


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
    model: str, repository: Path, times: "Measured", where: Path
) -> "tuple[Configuration, str, list[str]]":
    """Return the configuration to plan with, the model's name, and what does not fit the measured times."""
    from serve.planning import served
    from serve.repository import tree

    if not model:
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
