"""`loadtest merge`: the result files of workers that ran apart made into one."""

from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, json_option
from modelathe.errors import UsageError


@click.command()
@click.argument("results", type=PATH, metavar="FILE.jsonl...", nargs=-1, required=True)
@click.option("--output", type=PATH, required=True, metavar="FILE.jsonl", help="The one file.")
@json_option
def merge(results: tuple[Path, ...], output: Path, as_json: bool) -> None:
    """Make one result file of those that the workers of one run wrote, each started with its own --index.

    The workers began at one moment of their own clocks; how far these are apart is not known here, so let the machines
    keep their clocks by NTP.

    \b
    Example:
      loadtest merge results/0.jsonl results/1.jsonl --output whole.jsonl
    """
    from loadtest.judge import merge as merging

    if any(output.exists() and path.exists() and output.samefile(path) for path in results):
        raise UsageError("--output would overwrite one of the files", fix="give another name")
    merging.merge(results, output)
    if as_json:
        emit(document(results=str(output), workers=len(results)))
    else:
        click.echo(f"results: {output}")
