"""`loadtest run`: send load to a model and report on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from loadtest.commandline import PATH, emit, json_option
from loadtest.errors import BadInput, MachineError, Refused, UsageError
from loadtest.options import load_options, parts_of, plan_of


@click.command()
@click.argument("model")
@load_options
@click.option("--output", type=PATH, metavar="FILE.jsonl", help="Where to keep the results.")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@click.option("--allow-invalid", is_flag=True, help="Exit 0 for a run that proves nothing; the report says INVALID.")
@json_option
def run(
    model: str,
    url: str,
    html: Path | None,
    output: Path | None,
    allow_invalid: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Send load to MODEL and report latency, throughput and the server's own view.

    \b
    Examples:
      loadtest run digits --url grpc://127.0.0.1:8001
      loadtest run digits --url http://127.0.0.1:8000 \\
          --rate 200 --arrival poisson --html load.html
    """
    from loadtest import drive, live, page
    from loadtest.report import load_file

    plan = plan_of(url, options)
    for wanted in filter(None, (output, html)):
        if not wanted.parent.is_dir():
            raise BadInput("there is no such folder", where=str(wanted.parent), fix="create it, or write elsewhere")
        if wanted.is_dir():
            raise BadInput("is a folder", where=str(wanted), fix="name a file in it")
    if output and html and output.resolve() == html.resolve():
        raise UsageError("--output and --html are the same file", fix="give two names")
    path = output or _default_output(model)
    with _kept(path), live.shown(plan, quiet=as_json) as show:
        drive.run(plan, parts_of(plan, model, options), path, show)
    results, values = load_file(path)
    if html:
        page.write_loaded(results, values, html)
    _finish(values | {"results": str(path)}, path, as_json, allow_invalid)


def _default_output(model: str) -> Path:
    folder = Path("build/loads")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{model}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Say where the results of a run are that did not come to its end."""
    before = path.stat().st_mtime_ns if path.exists() else None
    try:
        yield
    except BaseException:
        if path.exists() and path.stat().st_mtime_ns != before:
            click.echo(f"results so far: {path}", err=True)
        raise


def _finish(values: dict[str, Any], path: Path, as_json: bool, allow_invalid: bool) -> None:
    """Print the report and leave with the exit code that the run deserves."""
    from rich.console import Console

    from loadtest.report import text

    failure = None
    if not values["valid"]:
        gone = "stopped answering" in values["why"]
        if gone or not allow_invalid:
            failure = (MachineError if gone else Refused)(values["why"], where=str(path), fix=values["fix"])
            failure.partial = values
    if not as_json:
        Console().print(text(values))
        click.echo(f"\nresults: {path}")
    if failure:
        raise failure
    if as_json:
        emit(values)
