"""Endpoint: where a server that is ready answers."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Endpoint:
    """A server that is ready.

    Args:
        http: `http://127.0.0.1:PORT`.
        grpc: `grpc://127.0.0.1:PORT`.
        metrics: `http://127.0.0.1:PORT`; the figures are under `/metrics`.
        pid: the process id of tritonserver.
        log: what it prints.
        models: the models that it was started with.
        secret: opens the restricted protocols (`serve.server.control`).
        tls: whether gRPC is encrypted.
    """

    http: str
    grpc: str
    metrics: str
    pid: int
    log: Path
    models: tuple[str, ...]
    secret: str = field(repr=False)
    tls: bool = False

    @property
    def plain(self) -> str:
        """The address at which this machine speaks without TLS."""
        return self.http if self.tls else self.grpc
