"""`serve tune`: the best configuration of a model on this machine."""

from pathlib import Path
from typing import Any

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, emit, json_option, quiet, quiet_option
from serve.commands.versions import repository_option

FASTEST = 1e6


@click.command()
@click.argument("model")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@click.option(
    "--for",
    "goal",
    type=click.Choice(("throughput", "latency", "cores")),
    help="What is best: the highest rate, the least latency or the fewest cores at --rate."
    "  [default: throughput, with a rate latency]",
)
@click.option("--rate", type=Number(0, FASTEST, min_open=True), help="Requests per second that come.")
@click.option("--arrival", help="How they follow each other, as in `loadtest run`.  [default: poisson]")
@click.option("--trace", type=PATH, help="Recorded traffic instead, as `loadtest run --trace` takes it.")
@click.option("--measured", type=PATH, help="The times of MODEL's calls.  [default: build/tune/MODEL/measured.json]")
@click.option("--page", type=PATH, help="Write the page there.  [default: tune.html beside the times]")
@click.option("--apply", is_flag=True, help="Publish what was found as MODEL's next version.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all that is drawn.")
@repository_option
@quiet_option
@json_option
def tune(model: str, slo: str, repository: Path, as_json: bool, **options: Any) -> None:
    """Find the threads, instances, largest batch and delay that serve MODEL best on this machine.

    Its calls are timed on private copies of it, every configuration is simulated, and the best few are tried live
    beside today's. What was measured is kept, and the next call goes on from it. Ends with 3 where none holds.

    \b
    Example:
      serve tune digits_cnn --slo "p99 < 20ms, errors < 0.1%" --rate 300
    """
    from rich.console import Console

    from serve.calls.tune import tune as found_by
    from serve.tuning import report

    found = found_by(model, slo, repository, quiet=as_json or quiet(), **options)
    if as_json:
        if found.passed:
            emit(found.document)
    else:
        Console().print(report.text(found.document))
        click.echo(f"page: {found.document['page']}")
        if found.applied:
            click.echo(f"published as version {found.applied}: serve promote {model} {found.applied}")
    found.check()
