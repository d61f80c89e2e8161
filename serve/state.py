"""The state file of a running `serve up`: process ids, addresses and secret, readable by its user alone."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest import files
from loadtest.commandline import document
from serve import control
from serve import repository as repositories
from serve.server import Endpoint


@dataclass(frozen=True)
class Running:
    """A `serve up` of this user's.

    Args:
        endpoint: its server.
        repository: what it serves.
        owner: the process id of `serve up` itself, which SIGTERM ends in order.
    """

    endpoint: Endpoint
    repository: Path
    owner: int


def folder() -> Path:
    """Return where state files are: the user's runtime folder, or the data folder where there is none."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "lathe"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "lathe" / "run"


@contextmanager
def recorded(endpoint: Endpoint, repository: Path) -> Iterator[Path]:
    """Keep the endpoint's state file, named after its HTTP port, while the block lasts."""
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder() / f"server-{urlsplit(endpoint.http).port}.json"
    state = document(
        owner=os.getpid(),
        pid=endpoint.pid,
        http=endpoint.http,
        grpc=endpoint.grpc,
        metrics=endpoint.metrics,
        tls=endpoint.tls,
        models=endpoint.models,
        repository=str(repository.absolute()),
        secret=endpoint.secret,
        log=str(endpoint.log),
    )
    files.write(path, json.dumps(state, indent=2), 0o600)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def everything() -> list[Running]:
    """Return all servers of this user's that are alive, by HTTP port; a file that a killed command left counts not."""
    found = []
    for path in folder().glob("server-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            running = _read(json.loads(path.read_text()))
            if _parent(running.endpoint.pid) == running.owner:
                found.append(running)
    return sorted(found, key=lambda running: urlsplit(running.endpoint.http).port or 0)


def serving(repository: Path) -> Endpoint | None:
    """Return the server of this user's that serves `repository`, None where none does."""
    there = (running.endpoint for running in everything() if running.repository == repository.absolute())
    return next((endpoint for endpoint in there if control.is_live(endpoint.http)), None)


def describe(endpoint: Endpoint, repository: Path) -> dict[str, Any]:
    """Return what `serve up` and `serve status` say of a server, as JSON values."""
    there = repositories.models(repository)
    models = [{"name": model, "versions": repositories.live(repository, model)} for model in there]
    addresses = {"http": endpoint.http, "grpc": endpoint.grpc, "metrics": f"{endpoint.metrics}/metrics"}
    return {
        "models": models,
        **addresses,
        "tls": endpoint.tls,
        "repository": str(repository),
        "pid": endpoint.pid,
        "log": str(endpoint.log),
    }


def _read(state: dict[str, Any]) -> Running:
    endpoint = Endpoint(
        http=state["http"],
        grpc=state["grpc"],
        metrics=state["metrics"],
        pid=state["pid"],
        log=Path(state["log"]),
        models=tuple(state["models"]),
        secret=state["secret"],
        tls=state["tls"],
    )
    return Running(endpoint, Path(state["repository"]), state["owner"])


def _parent(pid: int) -> int:
    """Return the process id of the parent of `pid`: numbers are given anew, but not in such pairs."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])
