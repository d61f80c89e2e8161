"""`optimize show` and `optimize runs`: what lies on disk: where a bundle comes from, and which runs there are."""

import sys
from pathlib import Path
from typing import Any

import click

from modelathe.commandline import PATH, document, emit, json_option
from modelathe.errors import BadInput, UsageError


@click.command()
@click.argument("bundle", type=PATH)
@json_option
def show(bundle: Path, as_json: bool) -> None:
    """Print the lineage of BUNDLE: every step, its config and its measurements.

    \b
    Example:
      optimize show build/runs/digits_cnn/latest/5-quantize.static
    """
    from optimize.report import table
    from optimize.step.bundle import describe

    description = describe(bundle)
    if as_json:
        emit(document(**{key: value for key, value in description.items() if key not in ("format", "modelathe")}))
    else:
        table.lineage(description)


@click.command()
@click.argument("folders", type=PATH, nargs=-1, metavar="[FOLDER]...")
@click.option("--clean", is_flag=True, help="Remove them, after a question; a run that is going on stays.")
@click.option("--yes", is_flag=True, help="With --clean: do not ask.")
@json_option
def runs(folders: tuple[Path, ...], clean: bool, yes: bool, as_json: bool) -> None:
    """List the runs in FOLDER, build/runs unless given: when, which steps, what came of it, how large on disk.

    Nothing removes a run but `--clean`. The proof of what was published lies with the version too.

    \b
    Example:
      optimize runs build/runs/digits_cnn
    """
    from optimize.report import table
    from optimize.runs.folder import listing, resume

    for folder in folders:
        if not folder.is_dir():
            raise BadInput("is no folder", where=str(folder), fix="give the folder of a run, or one that holds runs")
    if yes and not clean:
        raise UsageError("--yes answers a question of --clean", fix="say --clean --yes")
    places = sorted({place for folder in folders or (resume.RUNS,) for place in listing.find(folder)})
    found = [entry for entry in map(listing.describe, places) if entry]
    if not as_json:
        table.runs(found)
    going = [entry for entry in found if clean and entry["state"] != "running"]
    if going and not yes:
        _ask(going, as_json)
    removed = [entry["folder"] for entry in going if listing.remove(Path(entry["folder"]))]
    freed = sum(entry["bytes"] for entry in going if entry["folder"] in removed)
    if as_json:
        emit(document(runs=found, **({"removed": removed, "bytes": freed} if clean else {})))
    elif clean:
        click.echo(f"removed: {len(removed)} of {len(found)} runs, {freed:,} bytes")


def _ask(going: list[dict[str, Any]], as_json: bool) -> None:
    if as_json or not sys.stdin.isatty():
        raise UsageError("nobody can be asked whether they may go", fix="say --clean --yes")
    size = sum(entry["bytes"] for entry in going)
    if not click.confirm(f"remove {len(going)} of these runs with all that lies in them, {size:,} bytes?"):
        raise click.Abort
