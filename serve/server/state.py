"""The state file of a running `serve up`: process ids, addresses and secret, readable by its user alone."""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from loadtest.plan import served
from modelathe import files
from modelathe.commandline import document
from modelathe.errors import MachineError
from serve.config.errors import ServerFailed
from serve.repository import tree as repositories
from serve.server import control
from serve.server.endpoint import Endpoint

Condition = Literal["starting", "live", "silent"]


@dataclass(frozen=True)
class Running:
    """A `serve up` of this user's.

    Args:
        endpoint: its server; None until that is ready.
        repository: what it serves, without links.
        owner: the process id of `serve up` itself, which SIGTERM ends in order.
        program: whether that is a Python program in a `serve.up` block instead, which must leave it by itself.
    """

    endpoint: Endpoint | None
    repository: Path
    owner: int
    program: bool = False

    @property
    def condition(self) -> Condition:
        """Whether its server is not ready yet, answers, or does not answer."""
        if self.endpoint is None:
            return "starting"
        return "live" if control.is_live(self.endpoint.http) else "silent"

    @property
    def port(self) -> int | None:
        """The HTTP port, None until the server is ready."""
        return urlsplit(self.endpoint.http).port if self.endpoint else None

    @property
    def name(self) -> str:
        """What to call it: its address, or its process."""
        return self.endpoint.http if self.endpoint else f"process {self.owner}, starting"


@contextmanager
def claimed(repository: Path, program: bool = False) -> Iterator[Callable[[Endpoint], None]]:
    """Be the one `serve up` for `repository` while the block lasts, and say so to the other commands.

    Args:
        repository: what is served.
        program: as `Running` has it.

    Yields:
        What tells them the server once it is ready.

    Raises:
        BadRepository: it is no folder, or holds no model.
        MachineError: another one serves it, or is being started for it, whatever it calls the folder.
    """
    repositories.models(repository)
    place = repository.resolve()
    served.folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    # A program may hold several servers.
    path = served.folder() / f"server-{os.getpid()}-{secrets.token_hex(4)}.json"

    def write(**more: Any) -> None:
        owner = {"owner": os.getpid(), "began": served.began(os.getpid()), "program": program}
        state = document(**owner, repository=str(place), **more)
        files.write(path, json.dumps(state, indent=2), 0o600)

    def ready(endpoint: Endpoint) -> None:
        write(
            pid=endpoint.pid,
            http=endpoint.http,
            grpc=endpoint.grpc,
            metrics=endpoint.metrics,
            tls=endpoint.tls,
            models=endpoint.models,
            secret=endpoint.secret,
            log=str(endpoint.log),
        )

    with files.locked(served.folder(), wait=True):
        if any(running.repository == place for running in everything()):
            raise MachineError("is served already", where=str(place), fix="serve status shows by which server")
        write()
    try:
        yield ready
    finally:
        path.unlink(missing_ok=True)
        served.forget_probes(os.getpid())


def everything() -> list[Running]:
    """Return all servers of this user's, by their command's process; a file that a killed one left counts not."""
    return [
        Running(_endpoint(state), Path(state["repository"]), state["owner"], state.get("program", False))
        for state in served.states()
    ]


def serving(repository: Path) -> Endpoint | None:
    """Return the server of this user's that serves `repository`, whatever it is called here; None where none does.

    Raises:
        ServerFailed: it is not ready yet, or does not answer: what it serves then cannot be changed, nor known.
    """
    place = repository.resolve()
    for running in everything():
        if running.repository != place:
            continue
        condition = running.condition
        if condition == "starting":
            raise ServerFailed(
                "its server is being started", where=str(place), fix="try again when serve status shows it as live"
            )
        if condition == "silent":
            raise ServerFailed(
                f"its server at {running.name} does not answer",
                where=str(place),
                fix="try again, or end it with serve down and start it anew",
            )
        return running.endpoint
    return None


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


def _endpoint(state: dict[str, Any]) -> Endpoint | None:
    if "http" not in state:
        return None
    return Endpoint(
        http=state["http"],
        grpc=state["grpc"],
        metrics=state["metrics"],
        pid=state["pid"],
        log=Path(state["log"]),
        models=tuple(state["models"]),
        secret=state["secret"],
        tls=state["tls"],
    )
