"""Listing: which runs lie on disk, what came of each, and how they are removed.

Runs begin, end and are removed while this looks: whatever has gone meanwhile is as if it had not been there.
"""

import fcntl
import json
import os
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelathe import files
from modelathe.errors import MachineError
from optimize.runs.folder import resume
from serve.repository import scratch
from serve.repository.source import BUNDLE
from serve.repository.tree import PAGE


def find(place: Path) -> list[Path]:
    """Return the folders of runs: `place` itself, those in it, and those in its models' folders; no links."""
    near = _inside(place)
    found = [place, *near, *(inner for folder in near for inner in _inside(folder))]
    return sorted(folder for folder in found if not folder.is_symlink() and _is_run(folder))


def describe(folder: Path) -> dict[str, Any] | None:
    """Return what came of a run; None if it has gone meanwhile.

    Returns:
        `folder`, `name` of the model, `state` (running, unfinished, passed or refused), `when` (UTC), `steps`, the
        gates that `refused`, `quality`, `trained`, `ratios` and the published `version` where there are, `bytes` on
        disk, and the `page`.
    """
    try:
        return _described(folder)
    except FileNotFoundError:
        return None


def _described(folder: Path) -> dict[str, Any]:
    told = _json(folder / "run.json")
    refused = [entry["name"] for entry in told.get("gates", []) if not entry["passed"]]
    ended = "refused" if refused else "passed" if told else "unfinished"
    written = (folder / ("run.json" if told else resume.STATE)).stat().st_mtime
    return {
        "folder": str(folder),
        "name": told.get("workload") or _json(folder / "0-trained" / BUNDLE).get("name"),
        "state": "running" if _in_use(folder) else ended,
        "when": datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
        "steps": [step["use"] for step in told.get("recipe", _recipe(folder)).get("step", [])],
        "refused": refused,
        "quality": told.get("result", {}).get("quality"),
        "trained": told.get("trained", {}).get("quality"),
        "ratios": told.get("ratios"),
        "version": told.get("version"),
        "bytes": size(folder),
        "page": str(folder / PAGE) if (folder / PAGE).is_file() else None,
    }


def size(folder: Path) -> int:
    """Return the bytes of a run's files."""
    own = _own(folder)
    inside = [Path(place, name) for path in own for place, _, names in os.walk(path) for name in names]
    return sum(map(_bytes, (*own, *inside)))


def remove(folder: Path) -> bool:
    """Remove a run with all that lies in its folder; return whether it was: not one that runs, or that has gone before.

    Runs in folders inside stay. What makes the folder a run's goes last, so that a removal can be killed and repeated.
    """
    try:
        with scratch.locked(folder), scratch.folder(folder.parent, f".{folder.name}.removed-") as hidden:
            for path in sorted(_own(folder), key=lambda path: path.name == resume.STATE):
                files.move(path, hidden / path.name)
    except (MachineError, FileNotFoundError):
        return False
    with suppress(OSError):
        folder.rmdir()
    latest = folder.with_name(resume.LATEST)
    if latest.is_symlink() and not latest.exists():
        files.remove(latest)
    with suppress(OSError):  # other runs, or something else, are in it
        folder.parent.rmdir()
    return True


def _is_run(folder: Path) -> bool:
    """Tell a run's folder from one in which a file of another program has the same name; an older one has no digest."""
    there = (folder / resume.STATE).is_file()
    return there and (resume.RUN in resume.read(folder) or (folder / "recipe.toml").is_file())


def _inside(folder: Path) -> list[Path]:
    """Return the folders in a folder, but for links and for what is on its way in or out, whose names are hidden."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _bytes(file: Path) -> int:
    """Return the size of a file; 0 of a folder, and of what has gone."""
    try:
        return 0 if file.is_dir() else file.lstat().st_size
    except FileNotFoundError:
        return 0


def _own(folder: Path) -> list[Path]:
    """Return what lies in a run's folder, but for folders that hold other runs, and the link to one of those."""
    return [path for path in folder.iterdir() if not (path.is_dir() and (path.is_symlink() or find(path)))]


def _in_use(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # others may look at the same time
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "recipe.toml").read_text())
    except (OSError, ValueError):
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
