"""Detach: a `serve up` that goes on when its terminal does not, and how it ends."""

import json
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.plan import served
from modelathe import interpreter
from modelathe.errors import BadInput, MachineError, ModelatheError, UsageError
from serve.config.errors import ServerFailed
from serve.server import state
from serve.server.options import Listen
from serve.server.state import Running

KINDS: dict[int, type[ModelatheError]] = {kind.exit_code: kind for kind in (UsageError, BadInput, MachineError)}
GRACE = 60.0
"""Seconds that a server gets to finish what it has in flight."""


def start(repository: Path, listen: Listen, probe: bool, load_timeout: float) -> dict[str, Any]:
    """Start a `serve up` in a session of its own and return its document once its models are ready.

    What the server prints goes to `listen.log`, or a file beside the state file, what `serve up` says to one beside it.

    Raises:
        ModelatheError: it ended instead; the error is its own.
    """
    folder = served.folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(folder)
    log = (listen.log or folder / f"detached-{secrets.token_hex(4)}.log").absolute()
    listen, said = replace(listen, log=log), log.with_name(f"{log.name}.up")
    with tempfile.NamedTemporaryFile("w+", dir=folder, prefix=".starting-") as ready, said.open("w") as errors:
        process = subprocess.Popen(
            interpreter.command("serve", "up", str(repository), "--json", *_options(listen, probe, load_timeout)),
            env=interpreter.variables(),
            stdin=subprocess.DEVNULL,
            stdout=ready,
            stderr=errors,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                with suppress(ValueError):
                    document = json.loads(Path(ready.name).read_text())
                    if "error" not in document:
                        return dict(document)
                time.sleep(0.05)
        except BaseException:
            process.terminate()
            process.wait(GRACE)
            raise
        failure = _failure(process.returncode, Path(ready.name).read_text(), said.read_text())
    for path in (log, said):
        # The next server that is started this way removes a log that the error points at.
        if path.is_relative_to(folder) and str(path) not in failure.fix:
            path.unlink(missing_ok=True)
    raise failure


def _sweep(folder: Path) -> None:
    """Remove the logs of servers that are gone."""
    running = state.everything()
    kept = {one.endpoint.log for one in running if one.endpoint}
    if len(kept) < len(running):
        return  # one is being started, and its log is not known yet
    for path in folder.glob("detached-*.log"):
        if path not in kept:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.up").unlink(missing_ok=True)


def _options(listen: Listen, probe: bool, load_timeout: float) -> list[str]:
    options = ["--host", listen.host, "--log-level", listen.log_level, "--load-timeout", f"{load_timeout}s"]
    for kind in ("http", "grpc", "metrics"):
        options += [f"--{kind}-port", str(getattr(listen, f"{kind}_port"))]
    if listen.tls:
        options += ["--tls-cert", str(listen.tls.certificate), "--tls-key", str(listen.tls.key)]
        options += ["--tls-clients", str(listen.tls.clients)] if listen.tls.clients else []
    options += ["--accept-open-cves"] if listen.exposed else []
    options += ["--log", str(listen.log)] if listen.log else []
    return [*options, "--probe" if probe else "--no-probe"]


def _failure(code: int, document: str, said: str) -> ModelatheError:
    """Return the other process's error as ours, its exit code included."""
    try:
        error = json.loads(document)["error"]
    except (ValueError, KeyError):
        return ServerFailed(
            f"serve up ended with exit code {code}: {said.strip()[-500:]}", fix="run it without --detach"
        )
    return KINDS.get(error["exit"], ServerFailed)(error["what"], where=error["where"], fix=error["fix"])


def stop(running: Running) -> None:
    """End a `serve up` in order, and wait until it is gone.

    Raises:
        MachineError: a Python program holds it.
        ServerFailed: it is still there after a minute.
    """
    if running.program:
        raise MachineError(
            f"belongs to a Python program, process {running.owner}",
            where=running.name,
            fix="leave its `with serve.up(…)` block, or end the program",
        )
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(running.owner)
        try:
            os.kill(running.owner, signal.SIGTERM)
            if not select.select([handle], [], [], GRACE)[0]:
                raise ServerFailed(
                    f"is still running after {GRACE:g} s",
                    where=running.name,
                    fix=f"end its process {running.owner} with: kill -9",
                )
        finally:
            os.close(handle)
