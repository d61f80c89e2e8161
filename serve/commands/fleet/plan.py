"""`serve plan`: how many machines hold an objective at a rate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from modelathe.commandline import PATH, emit, json_option, quiet_option
from serve.calls.plan import OPTIONS
from serve.commands.versions import DEFAULT, meant


def _where(context: click.Context, option: click.Parameter, named: Path | None) -> Path | None:
    """Return the repository, which is looked for only where a model is named."""
    return meant(context, option, named) if context.params.get("model") else named


def _option(name: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return an option with the type and the default that the Python call has."""
    kind, default = OPTIONS[name.replace("-", "_")]
    shown = default not in (None, "", 0) or name == "seed"
    return click.option(f"--{name}", type=kind, default=default, show_default=shown, help=text)


@click.command()
@click.argument("model", required=False, default="", is_eager=True)
@click.option("--measured", type=PATH, required=True, help="The times of MODEL's calls, as `serve tune` writes them.")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@_option("rate", "Requests per second.  [default: the trace's]")
@_option("arrival", "How they follow each other: poisson, uniform or gamma:CV.  [default: poisson]")
@_option("trace", "Recorded traffic instead, as `loadtest run --trace` takes it.")
@_option("balance", "What spreads them.")
@_option("clients", "That pin connections.")
@_option("fail", "Replicas that may be lost.")
@_option("zones", "Zones, one of which may be lost.")
@_option("unavailable", "Replicas that an update takes away.")
@_option("start-seconds", "Until a new replica answers.  [default: measured]")
@_option("growth", "Of the traffic in a minute.")
@_option("machines", "A list of prices: [[machine]] with name, cores and price (for an hour).")
@_option("machine", "Which of them was measured.  [default: as the measured file says]")
@click.option("--repository", type=PATH, callback=_where, help="Where MODEL's configuration is read.")
@_option("requests", "To simulate.")
@_option("most", "Replicas to try.")
@_option("page", "An HTML file that shows the plan.")
@_option("seed", "Of all that is drawn.")
@quiet_option
@json_option
def plan(model: str, measured: Path, slo: str, repository: Path | None, as_json: bool, **options: Any) -> None:
    """Say how many replicas hold an objective at a rate, with what headroom, and what they cost.

    Many replicas behind a balancer are simulated, with times of a call that were measured. The configuration is that
    of MODEL in the repository, or what it was measured with. Nothing is started. Ends with 3 where no number holds.

    \b
    Example:
      serve plan --measured digits.json --rate 50000 \\
          --slo "p99 < 20ms" --zones 3 --machines prices.toml
    """
    from rich.console import Console

    from serve.calls.plan import plan
    from serve.planning import report

    found = plan(model, measured=measured, slo=slo, repository=repository or DEFAULT, quiet=as_json, **options)
    if as_json:
        emit(found.document)
    else:
        Console().print(report.text(found.document))
