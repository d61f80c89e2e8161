"""Served: what a `serve up` of this user's on this machine tells the other commands of itself.

It keeps two files in the user's runtime folder while it runs: its state, and how often its probe was answered.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelathe.errors import ModelMissing, closest

HERE = ("localhost", "127.0.0.1", "::1")


def folder() -> Path:
    """Return where these files are: the user's runtime folder, or the data folder where there is none."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "modelathe"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "modelathe" / "run"


def states() -> list[dict[str, Any]]:
    """Return the state of each `serve up` that runs; a file that a killed one left counts not."""
    found = []
    for path in folder().glob("server-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            if began(state["owner"]) == state["began"]:
                found.append(state)
    return sorted(found, key=lambda state: int(state["owner"]))


def at(url: str) -> dict[str, Any] | None:
    """Return the state of the `serve up` that answers at `url`; None where it is another's server."""
    asked = urlsplit(url)
    if asked.hostname not in HERE:
        return None
    for state in states():
        if asked.port and asked.port in (urlsplit(state.get(key, "")).port for key in ("http", "grpc")):
            return state
    return None


def began(pid: int) -> int:
    """Return when a process began, in ticks since the machine started: its number is given anew, but not with that."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


@contextmanager
def naming(url: str, model: str) -> Iterator[None]:
    """Make a `ModelMissing` of a `serve up` say which models there are: its server itself keeps that to itself."""
    try:
        yield
    except ModelMissing as error:
        if (state := at(url)) is None:
            raise
        place = Path(state["repository"])
        names = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
        fix = f"{closest(model, names)}it has: {', '.join(names) or 'none'}"
        raise ModelMissing(error.what, where=error.where, fix=fix) from error


def tell_probes(owner: int, answered: Mapping[str, int]) -> None:
    """Write down how often the probe of the `serve up` with this process id was answered, by model.

    It is a count and no record: a power cut may take it, so nothing is made durable every second.
    """
    path = folder() / f"probes-{owner}.json"
    beside = path.with_suffix(".part")
    with suppress(OSError):  # where it cannot be written, a load test says that the counts differ
        beside.write_text(json.dumps(answered))
        beside.replace(path)


def forget_probes(owner: int) -> None:
    """Remove what `tell_probes` has written."""
    (folder() / f"probes-{owner}.json").unlink(missing_ok=True)


def probes(url: str, model: str) -> int:
    """Return how often the probe of the `serve up` at `url` was answered by a model; 0 where none is known."""
    state = at(url)
    try:
        return int(json.loads((folder() / f"probes-{state['owner']}.json").read_text())[model]) if state else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
