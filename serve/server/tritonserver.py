"""A real tritonserver over a model repository, for as long as a `with` block lasts.

The server is an old one with known holes (docs/explanation/server.md), so nothing but inference and metadata is open:
loading models, shared memory, logging and tracing need a secret made at each start. The secret stands on the server's
command line, because tritonserver reads it nowhere else: whoever may list this machine's processes may read it.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.errors import MachineError
from serve.config.errors import BadRepository, ModelRefused, PortTaken, ServerFailed
from serve.repository import onnx_file, scratch
from serve.repository import tree as repositories
from serve.server import control, ending, options, processes
from serve.server.endpoint import Endpoint
from serve.server.install import Environment, environment
from serve.server.options import LOOPBACK, Listen

LAUNCH = Path(__file__).with_name("launch.py")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel keeps it, not a place for files of ours
KINDS = ("http", "grpc", "metrics")
SCHEMES = ("http", "grpc", "http")
STARTS = 3
"""How often a server is started that loses a lock meanwhile."""
UNSAFE = re.compile(r"[^\w@%+=:,./~-]")
"""Letters of a path that a shell would not take as they are."""
DEAD = 40
"""Looks, two seconds or more, for which a backend process must be dead before the server is given up: some end in order
while it starts. Looks and not seconds, since a machine that holds the server up holds them up as well."""
LOST_LOCK = "boost::interprocess::lock_exception"
LOOK = 0.2
"""Seconds between two looks at whether the server still runs."""


@contextmanager
def running(
    repository: Path,
    *,
    models: Sequence[str] | None = None,
    listen: Listen = LOOPBACK,
    cache: bool = True,
    timeout: float = 120,
    grace: float = 10,
) -> Iterator[Endpoint]:
    """Serve the repository until the block ends; then let requests in flight finish, and leave nothing behind.

    The server also stops when this process dies, in whatever way, and when the *thread* that started it ends: the
    kernel ties the two together. Start it from a thread that lives as long as the block.

    Args:
        repository: a Triton model repository; the digests of what `serve.repository.tree` published are verified first.
        models: which models to load; default all.
        listen: addresses, ports, TLS, what is logged and where to; free ports of the loopback address unless given.
        cache: answer from the response cache for models that ask for it; a proof asks the models themselves.
        timeout: seconds until all models must be ready.
        grace: seconds that requests in flight get at the end; 0 ends the server at once.

    Raises:
        BadRepository: the repository cannot be read, or its files are not those that were published.
        NotInstalled: the server's environment, or a runtime that a model asks for, is missing.
        PortTaken: a port that was asked for is in use; found before anything starts.
        ModelRefused: the server does not load a model, with its own reason.
        ServerFailed: it died, with its own reason.
    """
    place = environment()
    names = tuple(repositories.models(repository) if models is None else models)
    repositories.verify(repository, names)
    for name in names:
        _check_servable(repository, name, place)
    ports = _ports(listen)
    _sweep_shared_memory()
    with _plain(repository) as home, _log(listen.log) as path, path.open("wb") as output:
        secret, region = secrets.token_hex(32), f"modelathe-{os.getpid()}-{secrets.token_hex(8)}-"
        configs = {name: repositories.config(repository, name) for name in names}
        command = [
            str(place.tritonserver),
            f"--model-repository={home}",
            f"--backend-directory={place.backends}",
            f"--backend-config=python,shm-region-prefix-name={region}",
            *(f"--{kind}-address={listen.address(kind)}" for kind in KINDS),
            *(f"--{kind}-port={port}" for kind, port in zip(KINDS, ports, strict=True)),
            "--allow-gpu-metrics=false",
            f"--exit-timeout-secs={max(10, round(grace))}",
            *options.common(configs, secret, listen),
            *(options.cache(configs, place.caches) if cache else ()),
        ]
        named = zip(KINDS, SCHEMES, ports, strict=True)
        http, grpc, metrics = (f"{scheme}://{listen.reached(kind)}:{port}" for kind, scheme, port in named)
        planned = Endpoint(http, grpc, metrics, 0, path, names, secret, listen.tls is not None)
        process = partial(_process, command, place, output, grace, region)
        with _started(process, planned, timeout) as (tritonserver, endpoint):
            try:
                yield endpoint
            except MachineError as error:
                if isinstance(error, ServerFailed) or tritonserver.poll() is None:
                    raise
                # The client's error says that the server is gone; the server said why.
                raise ending.error(endpoint.http, endpoint.log, tritonserver.returncode) from error


@contextmanager
def _plain(repository: Path) -> Iterator[Path]:
    """Yield a path to the repository without letters that a shell treats in its own way.

    Triton's Python backend starts its processes in a shell, waits for them, and never learns that they did not start.

    Raises:
        BadRepository: there is none, since the folder for temporary files has such letters too.
    """
    path = repository.resolve()
    if not UNSAFE.search(str(path)):
        yield path
        return
    with scratch.folder() as at:
        link = at / "repository"
        if found := UNSAFE.search(str(link)):
            raise BadRepository(
                f"its path and that of temporary files, {at.parent}, have letters such as {found[0]!r} in them",
                where=str(repository),
                fix="move it, or set TMPDIR to a folder of plain letters, as in TMPDIR=/tmp",
            )
        link.symlink_to(path)
        yield link


@contextmanager
def _process(
    command: Sequence[str], place: Environment, output: IO[bytes], grace: float, region: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run tritonserver until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), *command],
        env=_variables(place),
        # The Python of its backend processes looks for modules in the folder where it runs.
        cwd=place.prefix,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in the terminal is for us; the server is stopped in order
    )
    try:
        yield process
    finally:
        _stop(process, grace, region)


@contextmanager
def _started(
    run: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]], planned: Endpoint, timeout: float
) -> Iterator[tuple[subprocess.Popen[bytes], Endpoint]]:
    """Run the server until the block ends, which begins when it is ready; start it again where it lost a lock.

    While it loads a model, Triton's Python backend gives its process a second for a sign of life. A machine that stands
    still for longer ends the whole server, by an exception that names a lock (triton-inference-server/server#8882).
    """
    for left in reversed(range(STARTS)):
        with run() as process:
            endpoint = replace(planned, pid=process.pid)
            try:
                _await_ready(process, endpoint, timeout)
            except (ModelRefused, ServerFailed):
                if (
                    left
                    and process.returncode == -signal.SIGABRT
                    and LOST_LOCK in endpoint.log.read_text(errors="replace")
                ):
                    continue
                raise
            yield process, endpoint
            return


def wait(endpoint: Endpoint) -> NoReturn:
    """Wait until the server dies by itself; called from the process that started it.

    Raises:
        ModelRefused, ServerFailed: always, with the server's last reason.
    """
    # A Ctrl-C that arrives just before a call that blocks is noticed only when the call ends; so no call lasts long.
    while not (end := os.waitid(os.P_PID, endpoint.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)):
        time.sleep(LOOK)
    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    raise ending.error(endpoint.http, endpoint.log, code)


def _check_servable(repository: Path, model: str, place: Environment) -> None:
    config = repositories.config(repository, model)
    place.require(config.backend)
    where = str(repository / model)
    if config.backend in processes.BACKENDS and not (model.isascii() and not UNSAFE.search(model)):
        fix = "rename its folder, and set the same name in its config.pbtxt"
        raise BadRepository("has a name with other letters than the server's processes take", where=where, fix=fix)
    if not options.complete(config):
        if config.backend != "onnxruntime":
            raise BadRepository("its config.pbtxt must list inputs and outputs", where=where, fix="complete it")
        _check_bare(repository / model, config)
    there = {path.name for path in repository.iterdir()}
    if missing := [name for name in repositories.calls(repository, model) if name not in there]:
        raise BadRepository(
            f"calls {missing[0]}, which is not in the repository", where=where, fix="publish that model"
        )
    if not repositories.live(repository, model):
        raise BadRepository("has no version that its config.pbtxt serves", where=where, fix="publish the model again")


def _check_bare(home: Path, config: ModelConfig) -> None:
    """Refuse a model of which the server cannot complete the configuration: its own words name another cause."""
    for number in repositories.live(home.parent, home.name):
        file = home / str(number) / (config.default_model_filename or repositories.MODEL_FILE)
        if file.is_file():
            onnx_file.values(file)


def _ports(listen: Listen) -> tuple[int, ...]:
    """Return the ports to use; all are held at once, so that they differ, and let go of right before the server starts.

    Raises:
        PortTaken: naming the option.
    """
    with ExitStack() as held:
        taken = []
        for kind in KINDS:
            option, port = f"--{kind}-port", getattr(listen, f"{kind}_port")
            listener = held.enter_context(socket.socket())
            # As the server does: connections of a server that has just stopped do not hold the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((listen.address(kind), port))
                listener.listen()
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else "there is no such port"
                raise PortTaken(
                    f"{option} {port} cannot be used: {reason}", fix=f"choose another {option}, or stop what uses it"
                ) from None
            taken.append(listener.getsockname()[1])
    return tuple(taken)


@contextmanager
def _log(path: Path | None) -> Iterator[Path]:
    """Yield the file for the server's output; a temporary one stays only where an error points at it."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.absolute()
        return
    handle, name = tempfile.mkstemp(prefix="modelathe-server-", suffix=".log")
    os.close(handle)
    try:
        yield Path(name)
    except (ModelRefused, ServerFailed):
        raise
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    else:
        Path(name).unlink(missing_ok=True)


def _variables(place: Environment) -> dict[str, str]:
    """Return the server's environment variables: its own Python, and none of the caller's Python settings."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    libraries = [str(place.libdir), str(place.site_packages / "nvidia_pytriton.libs"), variables.get("LD_LIBRARY_PATH")]
    return {
        **variables,
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        "PATH": f"{place.python.parent}:{variables.get('PATH', os.defpath)}",
        "PYTHONPATH": str(place.site_packages),
        "PYTHONNOUSERSITE": "1",
        "ORT_DISABLE_TELEMETRY": "1",  # it would report its use to its maker
    }


def _await_ready(process: subprocess.Popen[bytes], endpoint: Endpoint, timeout: float) -> None:
    end = time.monotonic() + timeout
    waiting = ["", *endpoint.models]
    dead: dict[int, int] = {}
    while waiting:
        if process.poll() is not None:
            raise ending.error(endpoint.http, endpoint.log, process.returncode, ready=False)
        if control.is_ready(endpoint.http, waiting[0]):
            waiting.pop(0)
        elif time.monotonic() > end:
            what = f"the model {waiting[0]} is" if waiting[0] else "the server is"
            raise ServerFailed(f"{what} not ready after {timeout:.0f} s", where=str(endpoint.log), fix="read this log")
        else:
            dead = {pid: dead.get(pid, 0) + 1 for pid in processes.scan(process.pid).dead}
            if max(dead.values(), default=0) > DEAD:
                raise ServerFailed(
                    f"a backend process died while the server was starting{ending.last_words(endpoint.log)}",
                    where=str(endpoint.log),
                    fix="read this log",
                )
            time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes], grace: float, region: str) -> None:
    """End the server and all of its processes, and remove the shared memory that they may have left."""
    try:
        if grace:
            process.terminate()
            # Unloading takes tritonserver some seconds beyond its own timeout for requests in flight.
            process.wait(grace + 5)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # A second Ctrl-C comes here at once.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in SHARED_MEMORY.glob(f"{region}*"):
            path.unlink(missing_ok=True)


def _sweep_shared_memory() -> None:
    """Remove the regions of servers whose command was killed before it could."""
    for path in SHARED_MEMORY.glob("modelathe-*"):
        owner = re.match(r"modelathe-(\d+)-[0-9a-f]{16}-", path.name)
        with suppress(OSError):
            # A server outlives its command by the time that it takes to stop.
            if owner and not Path("/proc", owner[1]).exists() and time.time() - path.stat().st_mtime > 60:
                path.unlink()
