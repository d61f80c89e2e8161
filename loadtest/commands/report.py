"""`loadtest report`: read result files again."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from loadtest.plan.options import threshold_option
from modelathe.commandline import PATH, document, emit, json_option
from modelathe.errors import BadInput, UsageError


@click.command()
@click.argument("results", type=PATH, metavar="FILE.jsonl...", nargs=-1, required=True)
@click.option("--html", type=PATH, metavar="FILE", help="Also write one self-contained page.")
@click.option("--csv", type=PATH, metavar="FILE", help="Also write one row per request.")
@click.option("--prometheus", type=PATH, metavar="FILE", help="Also write Prometheus's text format.")
@click.option("--junit", type=PATH, metavar="FILE", help="Also write JUnit's XML: validity and thresholds.")
@click.option("--summary", type=PATH, metavar="FILE", help="Also append Markdown, as to $GITHUB_STEP_SUMMARY.")
@threshold_option
@json_option
def report(
    results: tuple[Path, ...], html: Path | None, sentences: tuple[str, ...], as_json: bool, **others: Path | None
) -> None:
    """Report on a result file of `loadtest run`, or put several beside each other; the server is not asked.

    Several files give a table, and with --html the curve of latency over throughput.

    \b
    Examples:
      loadtest report build/loads/digits.jsonl --html load.html
      loadtest report digits.jsonl --threshold "p99 < 20ms, errors < 0.1%"
      loadtest report at-100.jsonl at-200.jsonl at-400.jsonl --html curve.html
    """
    from loadtest.judge import thresholds
    from loadtest.judge.summary import load_file
    from loadtest.report import exports, page
    from loadtest.report.terminal import text

    thresholds.parse(sentences)  # a wrong one is found before a large file is read

    wanted = {name: path for name, path in others.items() if path}
    _check(results, html, wanted)
    if len(results) > 1:
        if sentences:
            raise UsageError("--threshold takes one result file", fix="name one file")
        _several(results, html, as_json)
        return
    run, values = load_file(results[0], sentences)
    if html:
        page.write_loaded(run, values, html)
    for name, path in wanted.items():
        exports.WHOLE[name](run, values, path)
    failure = thresholds.refusal(values["thresholds"], str(results[0])) if sentences else None
    if not as_json:
        Console().print(text(values))
    if failure:
        failure.partial = values
        raise failure
    if as_json:
        emit(values)


def _check(results: tuple[Path, ...], html: Path | None, wanted: dict[str, Path]) -> None:
    if wanted and len(results) > 1:
        raise UsageError(f"--{next(iter(wanted))} takes one result file", fix="name one file, or use --html or --json")
    for name, path in {"html": html, **wanted}.items():
        if path and not path.parent.is_dir():
            raise BadInput("there is no such folder", where=str(path.parent), fix="create it, or write elsewhere")
        if path and path.exists() and any(one.exists() and path.samefile(one) for one in results):
            raise UsageError(f"--{name} would overwrite the results", fix="give another name")


def _several(results: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    from loadtest.judge.summary import summarize
    from loadtest.report import page, terminal

    runs: list[tuple[str, dict[str, Any]]] = [(path.stem, summarize(path)) for path in results]
    if html:
        page.write_several(runs, html)
    if as_json:
        emit(document(runs=[{"results": str(path), **run[1]} for path, run in zip(results, runs, strict=True)]))
    else:
        Console().print(terminal.several(runs))
