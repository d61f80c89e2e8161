"""`loadtest run`: send load to a model and report on it."""

from pathlib import Path
from typing import Any

import click

from loadtest.plan.options import allow_option, default_output, kept, load_options, parts_of, plan_of, threshold_option
from modelathe.commandline import PATH, emit, json_option
from modelathe.errors import BadInput, MachineError, ModelatheError, Refused, UsageError


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
    from loadtest.judge import compare, thresholds
    from loadtest.judge.summary import load_file
    from loadtest.load import drive
    from loadtest.report import live, page

    if options["scenario"]:
        if sentences:
            raise UsageError("a scenario states its own thresholds", fix="write them into its file")
        if baseline or save_baseline or allow is not None:
            raise UsageError("a baseline is of one run", fix="use `loadtest compare` on the phase you want")
        _play(model, options | {"allow_invalid": allow_invalid}, html, output, as_json)
        return
    for key, name in (("settings", "set"), ("pid", "pid")):
        if options[key]:
            raise UsageError(f"--{name} needs --scenario", fix="name a scenario")
    thresholds.parse(sentences)  # a wrong one is found before any load is sent
    if allow is not None and not baseline:
        raise UsageError("--allow needs --baseline", fix="say what the run is compared with")
    before = compare.read_side(baseline) if baseline else []
    plan = plan_of(options | {"thresholds": sentences})
    if before:
        compare.check_plan(before, plan)
    _check_files(output, html, save_baseline)
    parts = parts_of(plan, model, options)
    path = output or default_output(model, ".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept(path), live.shown(plan, quiet=as_json) as show:
        drive.run(plan, parts, path, show)
    results, values = load_file(path)
    if before:
        values["comparison"] = compare.with_run(before, path, allow)
    failure = _failure(values, path, allow_invalid)
    if save_baseline:
        failure = _save(values, path, save_baseline, failure)
    if html:
        page.write_loaded(results, values, html)
    _finish(values | {"results": str(path)}, failure, as_json)


def _check_files(output: Path | None, html: Path | None, save_baseline: Path | None) -> None:
    for wanted in filter(None, (output, html, save_baseline)):
        if not wanted.parent.is_dir():
            raise BadInput("there is no such folder", where=str(wanted.parent), fix="create it, or write elsewhere")
        if wanted.is_dir():
            raise BadInput("is a folder", where=str(wanted), fix="name a file in it")
    if output and html and output.resolve() == html.resolve():
        raise UsageError("--output and --html are the same file", fix="give two names")


def _play(model: str, options: dict[str, Any], html: Path | None, output: Path | None, as_json: bool) -> None:
    from loadtest.commands.scenario import play_and_report

    _check_files(None, html, None)
    if options["pid"] and options["metrics"]:
        raise UsageError("--pid and --metrics are both given", fix="--pid is the better one where you can")
    play_and_report(model, options | {"html": html}, output, as_json)


def _failure(values: dict[str, Any], path: Path, allow_invalid: bool) -> ModelatheError | None:
    """Return the failure that the run deserves; None where it passed."""
    from loadtest.judge import compare, thresholds, validity

    gone = values["fault"] == validity.GONE
    if not values["valid"] and (gone or not allow_invalid):
        return (MachineError if gone else Refused)(values["why"], where=str(path), fix=values["fix"])
    failure: ModelatheError | None = thresholds.refusal(values["thresholds"], str(path))
    return failure or (compare.refusal(values["comparison"]) if "comparison" in values else None)


def _save(
    values: dict[str, Any], path: Path, destination: Path, failure: ModelatheError | None
) -> ModelatheError | None:
    """Save a run that passed as a baseline; of another, note why not, and return its failure."""
    from loadtest.judge import baseline

    failure = failure or _failure(values, path, allow_invalid=False)
    if failure:
        way = "leave away the --threshold or --baseline that failed" if values["valid"] else values["fix"]
        values["notes"].append(f"{destination} was not written, only a run that passes becomes a baseline: {way}")
    else:
        baseline.write(baseline.read(path), destination)
    return failure


def _finish(values: dict[str, Any], failure: ModelatheError | None, as_json: bool) -> None:
    """Print the report and leave with the exit code that the run deserves."""
    from rich.console import Console

    from loadtest.judge import compare
    from loadtest.report.terminal import text

    if not as_json:
        Console().print(text(values))
        if "comparison" in values:
            Console().print("", compare.text(values["comparison"]), sep="\n")
        click.echo(f"\nresults: {values['results']}")
    if failure:
        failure.partial = values
        raise failure
    if as_json:
        emit(values)
