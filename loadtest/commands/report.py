"""`loadtest report`: read a result file again."""

from pathlib import Path

import click
from rich.console import Console

from loadtest.commandline import PATH, emit, json_option
from loadtest.errors import UsageError
from loadtest.options import threshold_option


@click.command()
@click.argument("results", type=PATH, metavar="FILE.jsonl")
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@threshold_option
@json_option
def report(results: Path, html: Path | None, sentences: tuple[str, ...], as_json: bool) -> None:
    """Report on a result file of `loadtest run`; the server is not asked.

    \b
    Examples:
      loadtest report build/loads/digits.jsonl --html load.html
      loadtest report digits.jsonl --threshold "p99 < 20ms, errors < 0.1%"
    """
    from loadtest import page, thresholds
    from loadtest.report import summarize, text

    thresholds.parse(sentences)  # a wrong one is found before a large file is read
    values = summarize(results)
    values["thresholds"] = thresholds.judge(values, sentences)
    if html and html.exists() and html.samefile(results):
        raise UsageError("--html would overwrite the results", fix="give another name")
    if html:
        page.write(results, html)
    failure = thresholds.refusal(values["thresholds"], str(results))
    if not as_json:
        Console().print(text(values))
    if failure:
        failure.partial = values
        raise failure
    if as_json:
        emit(values)
