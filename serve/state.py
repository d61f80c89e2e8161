"""The state file of a running `serve up`: process id, addresses and secret, readable by its user alone."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.commandline import document
from serve import control
from serve.server import Endpoint


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
        pid=endpoint.pid,
        http=endpoint.http,
        grpc=endpoint.grpc,
        metrics=endpoint.metrics,
        models=endpoint.models,
        repository=str(repository.absolute()),
        secret=endpoint.secret,
        log=str(endpoint.log),
    )
    # mkstemp gives the file to its user alone from the first moment.
    handle, partial = tempfile.mkstemp(dir=folder(), prefix=f".{path.name}-")
    with os.fdopen(handle, "w") as file:
        json.dump(state, file, indent=2)
    Path(partial).replace(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def serving(repository: Path) -> Endpoint | None:
    """Return the server of this user's that serves `repository`, None where none does."""
    for path in sorted(folder().glob("server-*.json")):
        with suppress(OSError, ValueError, KeyError):
            state = json.loads(path.read_text())
            endpoint = Endpoint(
                http=state["http"],
                grpc=state["grpc"],
                metrics=state["metrics"],
                pid=state["pid"],
                log=Path(state["log"]),
                models=tuple(state["models"]),
                secret=state["secret"],
            )
            # The file of a command that was killed stays; its server is gone.
            if Path(state["repository"]) == repository.absolute() and control.is_live(endpoint.http):
                return endpoint
    return None
