"""Resume: a run's own folder, which no other run changes, and what another run has made that this one needs too.

A run is known by its recipe and by the digests of code, weights and data. The same run finds its folder again and goes
on there; any other has another. Whether a bundle may be used again is decided by its key, see `optimize.runs.digest`.
"""

import json
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

from modelathe import files
from modelathe.errors import UsageError
from modelathe.interpreter import program
from optimize.model.errors import BadRecipe
from optimize.step.key import Key

RUNS = Path("build/runs")
"""Where runs lie that were given no folder: a folder for each model, in it one for each run."""
LATEST = "latest"
"""The link to the run of a model that ended last."""
PROOF = ("run.json", "report.html", "load.jsonl", "server.log", "trained-load.jsonl", "trained-server.log")
"""What a run says at its end, and how it came to it, of the bundles that lie beside it."""
STATE = "digests.json"
"""The file by which a folder is known as one of a run, and where the page finds what the run was made from."""
RUN = "run"
"""In that file, the digest by which the run is known."""


def own(name: str, key: Key) -> Path:
    """Return the folder of a run that was given none, by the model's name."""
    return RUNS / name / key.digest[:8]


def check(folder: Path) -> None:
    """Refuse a folder that holds something else than a run.

    Raises:
        BadRecipe: it is a file, or has files in it and no record of a run.
    """
    found = list(folder.iterdir()) if folder.is_dir() else []
    # A run that was killed while it wrote its record has left no more than the beginning of one.
    others = [path for path in found if not path.name.startswith(f".{STATE}.part-")]
    if folder.is_file() or (others and not (folder / STATE).is_file()):
        raise BadRecipe("exists and is not the folder of a run", where=str(folder), fix="name another --output")


def begin(folder: Path, key: Key, recipe: str) -> None:
    """Mark the folder as the run's, write its recipe, and remove the proof that this very run left there before.

    Args:
        folder: passed `check`.
        key: of the run.
        recipe: as TOML.

    Raises:
        UsageError: it is the folder of another run, of which nothing is touched.
    """
    if (folder / STATE).is_file() and (then := read(folder)).get(RUN) != key.digest:
        differing = [name for name, digest in key.parts.items() if then.get(name) != digest] or ["code"]
        raise UsageError(
            f"holds another run, which stays: what differs is {', '.join(differing)}",
            where=str(folder),
            fix="leave --output out, and every run has a folder of its own; or name another; or remove that run with: "
            f"{program('optimize')} runs {shlex.quote(str(folder))} --clean",
        )
    # First of all, so that the folder stays the run's however far this gets.
    note(folder, key, {})
    for name in PROOF:
        (folder / name).unlink(missing_ok=True)
    files.write(folder / "recipe.toml", recipe)


def note(folder: Path, key: Key, made: dict[str, str]) -> None:
    """Write down what the run is known by, and the keys of the bundles that it consists of, by name."""
    files.write(folder / STATE, json.dumps({RUN: key.digest, **key.parts, **made}, indent=2))


def read(folder: Path) -> dict[str, str]:
    """Return what `note` wrote; nothing where it cannot be read."""
    try:
        found = json.loads((folder / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def borrow(folder: Path, key: Key, runs: Path) -> Path | None:
    """Copy the bundle of that key from one of the folders of `runs` to `folder`, and return the run that had it.

    None has it where this returns None. Its content is not checked: whoever loads it does.
    """
    from optimize.step import bundle as bundles

    for description in sorted(runs.glob(f"*/[0-9]*-*/{bundles.DESCRIPTION}")):
        try:
            if json.loads(description.read_text()).get("key") != key.digest:
                continue
            with bundles.replacing(folder) as place:
                for file in description.parent.iterdir():
                    shutil.copyfile(file, place / file.name)
        except (FileNotFoundError, ValueError):  # another command removes it meanwhile, or it is none
            continue
        return description.parent.parent
    return None


def point(folder: Path) -> None:
    """Let the model's link `latest` name this run; where links cannot be made there is none."""
    link = folder.with_name(LATEST)
    beside = folder.with_name(f".{LATEST}.part")
    with suppress(OSError):
        beside.unlink(missing_ok=True)
        beside.symlink_to(folder.name)
        files.move(beside, link)
