"""Resume: what a run's folder is, and which bundles and checkpoints in it belong to the recipe that runs now.

Whether a bundle may be used again is decided by its key, see `optimize.runs.digest`.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from modelathe import files
from optimize.model.errors import BadRecipe
from optimize.runs.baseline import Progress
from optimize.runs.recipe import Recipe

PROOF = ("run.json", "report.html", "load.jsonl", "server.log", "trained-load.jsonl", "trained-server.log")
"""What a run says at its end, and how it came to it, of the bundles that lie beside it."""
STATE = "digests.json"
"""The file by which a folder is known as one of a run, and where the page finds what the run was made from."""


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


def prepare(folder: Path, recipe: Recipe, names: Sequence[str], progress: Progress) -> None:
    """Mark the folder as one of a run, write its recipe, and remove an earlier run's proof and steps that are gone.

    Args:
        folder: passed `check`.
        recipe: that runs now.
        names: of the bundles that it makes here.
        progress: told what is removed.
    """
    # First of all, so that the folder stays one of a run however far this gets.
    note(folder, {})
    for name in PROOF:
        (folder / name).unlink(missing_ok=True)
    files.write(folder / "recipe.toml", recipe.toml())
    for old in sorted((*folder.glob("[0-9]*-*"), *folder.glob(".[0-9]*-*.checkpoint"))):
        name = old.name.removeprefix(".").removesuffix(".checkpoint")
        if name not in names:
            progress(f"{old.name} is removed: the recipe has no such step any more", 0.0)
            shutil.rmtree(old)


def note(folder: Path, keys: dict[str, str]) -> None:
    """Write down the keys of the bundles that the run consists of, by name."""
    files.write(folder / STATE, json.dumps(keys, indent=2))
