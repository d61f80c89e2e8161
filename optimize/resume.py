"""Resume: a run's folder remembers what its bundles were made from, and starts anew when that has changed."""

import hashlib
import json
import shutil
from pathlib import Path

from loadtest import files
from loadtest.commandline import version
from optimize import step as steps_of
from optimize.baseline import Progress
from optimize.errors import BadRecipe
from optimize.recipe import Recipe
from optimize.workload import Workload, digest

STATE = "digests.json"


def prepare(folder: Path, recipe: Recipe, workload: Workload, progress: Progress) -> bool:
    """Keep the folder's bundles when they come from the same recipe, code and data; else clear it and say why."""
    progress("reading the data", 0.0)
    now = {
        "recipe": hashlib.sha256(recipe.toml().encode()).hexdigest(),
        **digest(workload),
        "model": steps_of.fingerprint(workload.build()),
        "lathe": version(),
    }
    before = _digests(folder)
    if before == now:
        return any(folder.glob("[1-9]*-*"))
    if before:
        changed = ", ".join(key for key in now if before.get(key) != now[key])
        progress(f"starting anew in {folder}: changed since the last run: {changed}", 0.0)
    state = folder / STATE
    # First of all, so that the folder stays one of a run however far this gets.
    files.write(state, json.dumps({"state": "unfinished"}))
    for old in (*folder.glob("[0-9]*-*"), *folder.glob(".[0-9]*-*.checkpoint")):
        shutil.rmtree(old)
    files.write(folder / "recipe.toml", recipe.toml())
    files.write(state, json.dumps(now, indent=2))
    return False


def check(folder: Path) -> None:
    """Refuse a folder that holds something else than a run.

    Raises:
        BadRecipe: it is a file, or has files in it and no record of a run.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file()):
        raise BadRecipe("exists and is not the folder of a run", where=str(folder), fix="name another --output")


def _digests(folder: Path) -> dict[str, str]:
    """Return what the folder's bundles were made from; empty for a new folder."""
    try:
        found = json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    return found if isinstance(found, dict) and found else {"state": "damaged"}
