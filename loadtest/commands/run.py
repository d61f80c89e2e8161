"""`loadtest run`: send load to a model and report on it."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.commandline import PATH, emit, json_option
from loadtest.errors import BadInput, MachineError, Refused, UsageError

if TYPE_CHECKING:
    from loadtest.drive import Plan, Progress
    from loadtest.tensors import Arrays

PAYLOADS = 16
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LINE_EVERY = 5.0


class Duration(click.ParamType[float]):
    """A length of time such as `10s`, `500ms` or `2m`, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)", str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a duration; write 500ms, 10s or 2m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


class Shape(click.ParamType[tuple[str, tuple[int, ...]]]):
    """`NAME:D1,D2` as the name of an input and its sizes."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Return name and sizes."""
        match = re.fullmatch(r"(.+):([1-9]\d*(?:,[1-9]\d*)*)", str(value))
        if not match:
            self.fail(f"{value!r} is not a shape; write NAME:D1,D2 without the batch axis", param, ctx)
        return match[1], tuple(int(size) for size in match[2].split(","))


@click.command()
@click.argument("model")
@click.option("--url", required=True, help="The server, as grpc://HOST:PORT or http://HOST:PORT.")
@click.option("--duration", type=Duration(), default="10s", show_default=True, help="How long to send.")
@click.option("--concurrency", type=int, help="Closed loop: requests always in flight.  [default: 8]")
@click.option("--rate", type=float, help="Open loop: requests per second, whatever the server does.")
@click.option("--arrival", help="With --rate: constant or poisson.  [default: constant]")
@click.option("--batch", type=int, default=1, show_default=True, help="Samples per request.")
@click.option("--version", default="", help="Version of the model.  [default: the server's choice]")
@click.option("--data", type=PATH, metavar="FILE.npz", help="Samples to send.")
@click.option("--repository", type=PATH, metavar="DIR", help="Take ranges, tolerance from it.")
@click.option("--shape", "shapes", type=Shape(), multiple=True, metavar="NAME:D1,D2", help="Sizes of an input.")
@click.option("--tolerance", type=float, help="Check the outputs; the largest difference allowed.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random values and arrival times.")
@click.option("--output", type=PATH, metavar="FILE.jsonl", help="Where to keep the results.")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@click.option("--timeout", type=Duration(), default="30s", show_default=True, help="For one request.")
@click.option("--warmup", type=Duration(), default="1s", show_default=True, help="Load before the run, not counted.")
@json_option
def run(model: str, url: str, html: Path | None, output: Path | None, as_json: bool, **options: Any) -> None:
    """Send load to MODEL and report latency, throughput and the server's own view.

    \b
    Examples:
      loadtest run digits --url grpc://127.0.0.1:8001
      loadtest run digits --url http://127.0.0.1:8000 \\
          --rate 200 --arrival poisson --html load.html
    """
    from loadtest import drive, page
    from loadtest.report import summarize

    plan = _plan(model, url, options)
    for wanted in filter(None, (output, html)):
        if not wanted.parent.is_dir():
            raise BadInput("there is no such folder", where=str(wanted.parent), fix="create it, or write elsewhere")
        if wanted.is_dir():
            raise BadInput("is a folder", where=str(wanted), fix="name a file in it")
    if output and html and output.resolve() == html.resolve():
        raise UsageError("--output and --html are the same file", fix="give two names")
    payloads, tolerance = _payloads(plan, options)
    path = output or _default_output(model)
    with _progress(plan, quiet=as_json) as show:
        drive.run(plan, payloads, path, show, tolerance)
    values = summarize(path) | {"results": str(path)}
    if html:
        page.write(path, html)
    _finish(values, path, as_json)


def _plan(model: str, url: str, options: dict[str, Any]) -> "Plan":
    from loadtest.drive import Plan

    concurrency, rate, tolerance = options["concurrency"], options["rate"], options["tolerance"]
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"--tolerance is {tolerance:g}", fix="give 0 or more")
    if options["arrival"] and rate is None:
        raise UsageError("--arrival needs --rate", fix="a closed loop sends when an answer comes back")
    if concurrency is None and rate is None:
        concurrency = 8
    taken = {key: options[key] for key in ("duration", "version", "seed", "timeout", "warmup")}
    return Plan(model, url, concurrency=concurrency, rate=rate, arrival=options["arrival"] or "constant", **taken)


def _payloads(plan: "Plan", options: dict[str, Any]) -> "tuple[list[Arrays], float | None]":
    """Return the requests and the tolerance for their answers, from --data, --repository or the server's metadata."""
    from loadtest import answers, payload
    from loadtest.client import connect

    with connect(plan.url) as client:
        stated, _ = client.metadata(plan.model, plan.version)
        version = client.served_version(plan.model, plan.version)
    specs, tolerance = stated, options["tolerance"]
    if options["repository"]:
        specs, deviation = payload.from_lineage(options["repository"], plan.model, version)
        if tolerance is None and deviation is not None:
            tolerance = answers.tolerance(deviation)
        if {(spec.name, spec.dtype) for spec in specs} != {(spec.name, spec.dtype) for spec in stated}:
            raise BadInput(
                "its inputs are not those of the model that the server has",
                where=str(options["repository"] / plan.model / version / "lineage.json"),
                fix="give the repository that the server serves",
            )
    if options["data"]:
        return payload.load_npz(options["data"], stated, options["batch"]), tolerance
    specs = payload.with_shapes(specs, dict(options["shapes"]))
    return payload.generate(specs, PAYLOADS, plan.seed, options["batch"]), tolerance


def _default_output(model: str) -> Path:
    folder = Path("build/loads")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"


def _finish(values: dict[str, Any], path: Path, as_json: bool) -> None:
    """Print the report and leave with the exit code that the run deserves."""
    from rich.console import Console

    from loadtest.report import text

    failure = None
    if not values["valid"]:
        gone = "stopped answering" in values["why"]
        failure = (MachineError if gone else Refused)(values["why"], where=str(path), fix=values["fix"])
        failure.partial = values
    if not as_json:
        Console().print(text(values))
        click.echo(f"\nresults: {path}")
    if failure:
        raise failure
    if as_json:
        emit(values)


@contextmanager
def _progress(plan: "Plan", quiet: bool) -> "Iterator[Callable[[Progress], None]]":
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
