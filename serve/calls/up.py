"""`serve.up`: a server for as long as a block of a Python program lasts; the command `serve up` starts it alike."""

import atexit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from loadtest.calls import keywords
from loadtest.calls.keywords import Place
from modelathe.commandline import document
from modelathe.errors import MachineError, UsageError
from modelathe.notebook import Result, View
from serve.rollout import promotion
from serve.server import state, tritonserver
from serve.server.endpoint import Endpoint
from serve.server.options import Listen, LogLevel, Tls
from serve.watch import healing

LOAD_TIMEOUT = 120.0


class UpOptions(TypedDict, total=False):
    """The options of the command `serve up`."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    tls_cert: Place
    tls_key: Place
    tls_clients: Place
    accept_open_cves: bool
    log: Place
    log_level: LogLevel
    probe: bool
    load_timeout: float


@dataclass(frozen=True, kw_only=True)
class Server(Result):
    """A server that is ready, and the addresses at which clients reach it.

    Args:
        http: `http://HOST:PORT`.
        grpc: `grpc://HOST:PORT`.
        metrics: `http://HOST:PORT/metrics`.
        models: the names of its models.
        log: the file with what it prints.
        pid: its process.
    """

    http: str
    grpc: str
    metrics: str
    models: tuple[str, ...]
    log: Path
    pid: int

    def view(self) -> View:
        """Return its models and addresses."""
        models = [
            f"{model['name']}, version {', '.join(map(str, model['versions']))}" for model in self.document["models"]
        ]
        addresses = {"gRPC": self.grpc, "HTTP": self.http, "metrics": self.metrics}
        return View(f"serves {'; '.join(models)}", {**addresses, "log": str(self.log)})


@contextmanager
def up(repository: Place, **options: Unpack[UpOptions]) -> Iterator[Server]:
    """Serve every model of a repository on this machine until the block ends; requests in flight are finished.

    The server also ends when this process does, in whatever way, and when the thread ends that entered the block. To
    keep it from one cell of a notebook to another, enter it with a `contextlib.ExitStack`.

    Args:
        repository: a model repository.
        options: those of the command `serve up`, with underscores. Ports that are not given are free ones, which the
            addresses name. `load_timeout` is in seconds.

    Yields:
        The addresses.

    Raises:
        BadRepository, NotInstalled, PortTaken, ModelRefused, ServerFailed: as `serve up` would end.
        MachineError: a server of yours serves the repository already.
    """
    keywords.check(options, UpOptions.__annotations__)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    probe, load_timeout = given.pop("probe", True), given.pop("load_timeout", LOAD_TIMEOUT)
    for key in ("tls_cert", "tls_key", "tls_clients", "log"):
        given[key] = Path(given[key]) if key in given else None
    place = Path(repository)
    with ExitStack() as stack:
        # A notebook that ends while a block is open would not leave it.
        atexit.register(stack.close)
        stack.callback(atexit.unregister, stack.close)
        endpoint = stack.enter_context(serving(place, listen(**given), probe, load_timeout, program=True))
        told = document(**state.describe(endpoint, place))
        names = tuple(model["name"] for model in told["models"])
        addresses = {kind: told[kind] for kind in ("http", "grpc", "metrics")}
        yield Server(document=told, models=names, log=endpoint.log, pid=endpoint.pid, **addresses)


@contextmanager
def serving(
    repository: Path, listening: Listen, probe: bool, load_timeout: float, *, program: bool = False
) -> Iterator[Endpoint]:
    """Serve a repository until the block ends, as the one server of this user's that does.

    Args:
        repository: its folder.
        listening: addresses and the like.
        probe: watch the models, and replace dead backend processes.
        load_timeout: seconds until all models must be ready.
        program: whether a Python program holds the server, which `serve down` must not end.

    Raises:
        As `up`.
    """
    alone(repository)
    with ExitStack() as stack:
        tell = stack.enter_context(state.claimed(repository, program=program))
        promotion.settle(repository)
        endpoint = stack.enter_context(tritonserver.running(repository, listen=listening, timeout=load_timeout))
        if probe:
            stack.enter_context(healing.watching(endpoint, repository))
        tell(endpoint)
        yield endpoint


def alone(repository: Path) -> None:
    """Refuse a repository that a server of this user's serves: a release reaches one, another would go on as before.

    Raises:
        MachineError: there is one.
    """
    if other := state.serving(repository):
        fix = "end that one with: serve down; or serve a copy of the repository"
        raise MachineError("is served already", where=f"{repository}, at {other.http}", fix=fix)


def listen(
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_clients: Path | None = None,
    accept_open_cves: bool = False,
    **addresses: Any,
) -> Listen:
    """Return where a server listens, from the options by their names.

    Raises:
        UsageError: a certificate without its key, or an address that must not be opened.
    """
    if bool(tls_cert) != bool(tls_key) or (tls_clients and not tls_cert):
        raise UsageError(
            "--tls-cert and --tls-key belong together", fix="give both, --tls-clients beside them if wanted"
        )
    tls = Tls(tls_cert, tls_key, tls_clients) if tls_cert and tls_key else None
    return Listen(tls=tls, exposed=accept_open_cves, **addresses)
