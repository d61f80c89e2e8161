"""`loadtest capacity`: the highest rate that holds an objective."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import PROBES_DECIDE, Duration, Number, Share, load_options
from modelathe.commandline import PATH, emit, json_option, quiet_option

if TYPE_CHECKING:
    from rich.console import RenderableType


@click.command()
@click.argument("model")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@load_options
@click.option("--start", type=Number(min=0, min_open=True), help="The first rate.  [default: from a short closed loop]")
@click.option("--precision", type=Share(), default="5%", show_default=True, help="Half the width of the interval.")
@click.option(
    "--budget", type=Duration(), default="150s", show_default=True, help="Start no probe near the edge after it."
)
@click.option("--output", type=PATH, metavar="DIR", help="A new folder for the results of the probes.")
@quiet_option
@json_option
def capacity(
    model: str,
    slo: str,
    start: float | None,
    precision: float,
    budget: float,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the highest rate at which MODEL holds an objective, with a 95 % interval.

    Short open-loop runs (--duration each, Poisson arrivals unless --arrival says otherwise) are placed near the edge
    until the interval is narrow or the time is spent. The objective speaks of shares of the requests: percentiles of
    latency or service, errors, timeouts, mismatches. Where it says nothing of errors, "errors < 1%" is added.

    \b
    Example:
      loadtest capacity digits --url grpc://127.0.0.1:8001 \\
          --slo "p99 < 20ms, errors < 0.1%"
    """
    from rich.console import Console

    from loadtest.calls.capacity import Asked, find

    options |= PROBES_DECIDE
    found = find(model, Asked(slo, start, precision, budget, output), options, quiet=as_json)
    if not as_json:
        Console().print(_text(found.document))
        click.echo(f"\nresults: {found.results}")
    found.check()
    if as_json:
        emit(found.document)


# The probes decide on these; an option that is ignored would be a lie.
capacity.params = [option for option in capacity.params if option.name not in PROBES_DECIDE]


def _text(values: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from loadtest.probing import report
    from loadtest.record.table import table

    shown = table("rate/s", "requests", "p50 ms", "p99 ms", "bad", "verdict", figures=slice(5))
    for probe in values["probes"]:
        times = probe["latency_ms"]
        bad = max(probe["bad"][text] / max(probe["counted"][text], 1) for text in probe["bad"])
        cells = (f"{probe['rate']:,.1f}", f"{probe['requests']:,}", f"{times['p50']:.2f}", f"{times['p99']:.2f}")
        shown.add_row(*cells, f"{bad:.2%}", probe["verdict"])
    lines = [Text(report.headline(values), "bold")]
    lines += [Text(f"stopped: {values['stopped']}, after {values['seconds']:.0f} s, {len(values['probes'])} probes")]
    lines += [Text(f"note: {note}", "yellow") for note in values["notes"]]
    return Group(*lines, Text(), shown)
