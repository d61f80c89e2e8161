"""`loadtest run`: send load to a model and report on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.commandline import PATH, emit, json_option
from loadtest.errors import BadInput, LatheError, MachineError, Refused, UsageError
from loadtest.options import allow_option, load_options, parts_of, plan_of, threshold_option

if TYPE_CHECKING:
    from loadtest.loop import Progress
    from loadtest.plan import Plan

_LINE_EVERY = 5.0


@click.command()
@click.argument("model")
@load_options
@click.option("--scenario", metavar="NAME|FILE", help="Play these phases; `loadtest scenario list` lists them.")
@click.option("--set", "settings", multiple=True, metavar="[PHASE.]KEY=VALUE", help="Change a scenario's phases.")
@click.option("--pid", type=int, help="With --scenario: the server's process, to watch its memory for a leak.")
@click.option("--metrics", metavar="URL", help="With --scenario: the server's metrics, to watch its machine's memory.")
@click.option("--output", type=PATH, metavar="FILE.jsonl", help="Where to keep the results; a folder for a scenario.")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@threshold_option
@click.option("--baseline", type=PATH, metavar="FILE", help="Compare the run with this one: a baseline, a result file.")
@allow_option
@click.option("--save-baseline", type=PATH, metavar="FILE.json", help="Keep what later comparisons need of the run.")
@json_option
def run(
    model: str,
    url: str,
    html: Path | None,
    output: Path | None,
    sentences: tuple[str, ...],
    baseline: Path | None,
    allow: float | None,
    save_baseline: Path | None,
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
    from loadtest import compare, drive, page, thresholds
    from loadtest.report import summarize

    chosen = {key: options.pop(key) for key in ("scenario", "settings", "pid", "metrics")}
    if chosen["scenario"]:
        if sentences or baseline or save_baseline:
            raise UsageError("a scenario states its own thresholds", fix="write them into its file")
        _play(model, url, options, chosen, html, output, as_json)
        return
    if given := [key for key, value in chosen.items() if value]:
        raise UsageError(f"--{given[0].replace('settings', 'set')} needs --scenario", fix="name a scenario")
    thresholds.parse(sentences)  # a wrong one is found before any load is sent
    if allow is not None and not baseline:
        raise UsageError("--allow needs --baseline", fix="say what the run is compared with")
    before = compare.read_side(baseline) if baseline else []
    plan = plan_of(url, options)
    for wanted in filter(None, (output, html, save_baseline)):
        if not wanted.parent.is_dir():
            raise BadInput("there is no such folder", where=str(wanted.parent), fix="create it, or write elsewhere")
        if wanted.is_dir():
            raise BadInput("is a folder", where=str(wanted), fix="name a file in it")
    if output and html and output.resolve() == html.resolve():
        raise UsageError("--output and --html are the same file", fix="give two names")
    parts = parts_of(plan, model, options)
    path = output or _default_output(model)
    with progress_of(plan, quiet=as_json) as show:
        drive.run(plan, parts, path, show)
    values = summarize(path) | {"results": str(path)}
    values["thresholds"] = thresholds.judge(values, sentences)
    if before:
        values["comparison"] = compare.with_run(before, path, allow)
    if save_baseline:
        compare.save(path, save_baseline)
    if html:
        page.write(path, html)
    _finish(values, path, as_json)


def _play(
    model: str,
    url: str,
    options: dict[str, Any],
    chosen: dict[str, Any],
    html: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    from loadtest.commands.scenario import play_and_report

    if html:
        raise UsageError("--html is for one run", fix="use `loadtest report FILE --html` for the phase you want")
    if chosen["pid"] and chosen["metrics"]:
        raise UsageError("--pid and --metrics are both given", fix="--pid is the better one where you can")
    source = str(chosen["pid"] or chosen["metrics"] or "")
    settings = chosen["settings"]
    play_and_report(model, url, options, chosen["scenario"], settings, output, source, as_json, progress_of)


def _default_output(model: str) -> Path:
    folder = Path("build/loads")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"


def _finish(values: dict[str, Any], path: Path, as_json: bool) -> None:
    """Print the report and leave with the exit code that the run deserves."""
    from rich.console import Console

    from loadtest import compare, thresholds
    from loadtest.report import text

    failure: LatheError | None = thresholds.refusal(values["thresholds"], str(path))
    if "comparison" in values:
        failure = failure or compare.refusal(values["comparison"])
    if not values["valid"]:
        gone = "stopped answering" in values["why"]
        failure = (MachineError if gone else Refused)(values["why"], where=str(path), fix=values["fix"])
    if not as_json:
        Console().print(text(values))
        if "comparison" in values:
            Console().print("", compare.text(values["comparison"]), sep="\n")
        click.echo(f"\nresults: {path}")
    if failure:
        failure.partial = values
        raise failure
    if as_json:
        emit(values)


@contextmanager
def progress_of(plan: "Plan", quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """Show how far the run is: a bar on a terminal, a line every few seconds elsewhere, nothing with --json."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield (lambda state: None) if quiet else _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[counts]}"))
    # Drawn only when told to: a refreshing thread would take the interpreter away from the sender at random moments.
    with Bar(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("warm-up", total=plan.duration, counts="")
        drawn = -1.0

        def show(state: "Progress") -> None:
            nonlocal drawn
            if abs(state.elapsed - drawn) < 0.5:
                return
            drawn = state.elapsed
            bar.update(
                task,
                description="warm-up" if state.warming else "sending",
                completed=0 if state.warming else min(state.elapsed, plan.duration),
                counts=f"{state.done:,} done, {state.failed:,} failed",
            )
            bar.refresh()

        yield show


def _lines() -> "Callable[[Progress], None]":
    last = 0.0

    def show(state: "Progress") -> None:
        nonlocal last
        if not state.warming and state.elapsed - last >= _LINE_EVERY:
            last = state.elapsed
            click.echo(f"{state.elapsed:.0f} s: {state.done:,} done, {state.failed:,} failed", err=True)

    return show
