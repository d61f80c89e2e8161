"""`loadtest run`: send load to a model and report on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from loadtest.plan.options import allow_option, load_options, threshold_option
from modelathe.commandline import PATH, emit, json_option, quiet_option

if TYPE_CHECKING:
    from loadtest.calls.results import LoadResult, ScenarioResult


@click.command()
@click.argument("model")
@load_options
@click.option("--scenario", metavar="NAME|FILE", help="Play these phases; `loadtest scenario list` lists them.")
@click.option("--set", "settings", multiple=True, metavar="[PHASE.]KEY=VALUE", help="Change a scenario's phases.")
@click.option("--pid", type=int, help="With --scenario: the server's process, to watch its memory for a leak.")
@click.option("--output", type=PATH, metavar="FILE.jsonl", help="Where to keep the results; a folder for a scenario.")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@threshold_option
@click.option("--baseline", type=PATH, metavar="FILE", help="Compare the run with this one: a baseline, a result file.")
@allow_option
@click.option(
    "--save-baseline", type=PATH, metavar="FILE.json", help="Keep what later comparisons need of a run that passes."
)
@click.option("--allow-invalid", is_flag=True, help="Exit 0 for a run that proves nothing; the report says INVALID.")
@quiet_option
@json_option
def run(
    model: str,
    html: Path | None,
    output: Path | None,
    sentences: tuple[str, ...],
    baseline: Path | None,
    allow: float | None,
    save_baseline: Path | None,
    allow_invalid: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Send load to MODEL and report latency, throughput and the server's own view.

    \b
    Examples:
      loadtest run digits --url grpc://127.0.0.1:8001
      loadtest run digits --url grpc://127.0.0.1:8001 \\
          --baseline loads/digits.json --allow 5%
      loadtest run digits --url http://127.0.0.1:8000 \\
          --rate 200 --arrival poisson --threshold "p99 < 20ms"
      loadtest run digits --url grpc://127.0.0.1:8001 --trace recorded.jsonl --speed 2
      loadtest run digits --url grpc://127.0.0.1:8001 \\
          --scenario spike --set duration=10s

    \b
    --data takes
      FILE.npz    an array for each input, samples first; of outputs: the right ones
      FILE.json   perf_analyzer's format, with validation_data and sequences
      FILE.jsonl  recorded traffic: a V2 request, its model and `at` in each line
      FILE.txt    one text per line, for a model that takes strings
      FOLDER      an .npz file, a subfolder or a file for each request
    """
    from loadtest.calls import run as calls

    context = click.get_current_context()
    stated = {name for name in options if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    asked = calls.Asked(output, html, sentences, baseline, allow, save_baseline, allow_invalid)
    result = calls.measure(model, options, asked, stated=stated, quiet=as_json)
    if not as_json:
        _show(result)
    result.check()
    if as_json:
        emit(result.document)


def _show(result: "LoadResult | ScenarioResult") -> None:
    from rich.console import Console

    from loadtest.calls.results import LoadResult
    from loadtest.judge import compare
    from loadtest.report import terminal
    from loadtest.scenario import play

    console, values = Console(), result.document
    console.print(terminal.text(values) if isinstance(result, LoadResult) else play.text(values))
    if "comparison" in values:
        console.print("", compare.text(values["comparison"]), sep="\n")
    click.echo(f"\nresults: {result.results}")
