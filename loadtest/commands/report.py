"""`loadtest report`: read a result file again."""

from pathlib import Path

import click
from rich.console import Console

from loadtest.commandline import PATH, emit, json_option
from loadtest.errors import UsageError


@click.command()
@click.argument("results", type=PATH, metavar="FILE.jsonl")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@json_option
def report(results: Path, html: Path | None, as_json: bool) -> None:
    """Report on a result file of `loadtest run`; the server is not asked.

    \b
    Example:
      loadtest report build/loads/digits.jsonl --html load.html
    """
    from loadtest import page
    from loadtest.report import summarize, text

    values = summarize(results)
    if html and html.exists() and html.samefile(results):
        raise UsageError("--html would overwrite the results", fix="give another name")
    if html:
        page.write(results, html)
    if as_json:
        emit(values)
    else:
        Console().print(text(values))
