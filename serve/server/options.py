"""Options: what a tritonserver is told on its command line, the embedded one and NVIDIA's image alike."""

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.errors import UsageError
from serve.config import releases
from serve.config.errors import BadRepository
from serve.server import control

HOST = "127.0.0.1"
CACHE_BYTES = 64 * 2**20
"""How much the response cache of all models holds."""
LEVELS = {
    "error": ("--log-info=false", "--log-warning=false"),
    "warning": ("--log-info=false",),
    "info": (),
    "verbose": ("--log-verbose=1",),
}
LogLevel = Literal["error", "warning", "info", "verbose"]


@dataclass(frozen=True)
class Tls:
    """The files, in PEM, with which a port is encrypted.

    Args:
        certificate: the server's.
        key: its private key.
        clients: the authority whose certificates clients must show; without it any client may speak.
    """

    certificate: Path
    key: Path
    clients: Path | None = None

    def files(self) -> list[Path]:
        """Return the files.

        Raises:
            BadRepository: one is not there.
        """
        files = [path for path in (self.certificate, self.key, self.clients) if path]
        for path in files:
            if not path.is_file():
                raise BadRepository("there is no such file", where=str(path), fix="give a file in PEM")
        return files

    def options(self) -> list[str]:
        """Return tritonserver's options.

        Raises:
            BadRepository: a file is not there, or the key is not the certificate's.
        """
        self.files()
        try:
            # Of a wrong pair tritonserver says that its port is in use.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, lambda: "")
        except ssl.SSLError:
            raise BadRepository(
                f"and {self.key} are no certificate and its key",
                where=str(self.certificate),
                fix="give the certificate, and its key without a password, in PEM",
            ) from None
        files = {"server-cert": self.certificate, "server-key": self.key, "root-cert": self.clients}
        named = [f"--grpc-{name}={path.absolute()}" for name, path in files.items() if path]
        return ["--grpc-use-ssl=true", f"--grpc-use-ssl-mutual={'true' if self.clients else 'false'}", *named]


@dataclass(frozen=True)
class Listen:
    """Where a server listens, and how it speaks.

    Args:
        host: the address; nothing but loopback without `exposed` where the release has known holes. With `tls` it is
            that of gRPC alone; HTTP and the metrics, which tritonserver cannot encrypt, stay on loopback.
        http_port: 0 picks a free one, as for the other two.
        grpc_port: see `http_port`.
        metrics_port: see `http_port`.
        tls: encrypts gRPC; tritonserver knows no TLS over HTTP (`serve proxy`).
        log_level: how much it logs.
        log: file for what it prints; default a temporary one, which is kept only if the server fails.
        exposed: who starts it knows that its holes are open to whoever reaches `host`.
        release: of the server.
    """

    host: str = HOST
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    tls: Tls | None = None
    log_level: LogLevel = "info"
    log: Path | None = None
    exposed: bool = False
    release: str = releases.CARRIED

    def __post_init__(self) -> None:
        try:
            loopback = self._loopback
        except ValueError:
            raise UsageError(
                f"--host {self.host} is no IPv4 address", fix="give one such as 127.0.0.1 or 0.0.0.0"
            ) from None
        count = len(releases.open_cves(self.release))
        if count and not loopback and not self.exposed:
            raise UsageError(
                f"--host {self.host} opens a server with {count} known CVEs to others",
                fix=f"use --container {releases.CLOSED}, `serve proxy` before 127.0.0.1, or say --accept-open-cves",
            )

    @property
    def _loopback(self) -> bool:
        return ipaddress.IPv4Address(self.host).is_loopback

    def address(self, kind: str) -> str:
        """Return where `kind` (http, grpc or metrics) listens: with TLS, what cannot be encrypted stays on loopback."""
        return HOST if self.tls and kind != "grpc" and not self._loopback else self.host

    def reached(self, kind: str) -> str:
        """Return the address at which this machine reaches `kind`."""
        address = self.address(kind)
        return HOST if ipaddress.ip_address(address).is_unspecified else address


LOOPBACK = Listen()


def common(configs: Mapping[str, ModelConfig], secret: str, listen: Listen) -> list[str]:
    """Return the options that hold for the embedded server and for NVIDIA's image.

    Args:
        configs: the models to load, by name.
        secret: opens what is not inference or metadata: loading, shared memory, logging and tracing.
        listen: TLS and the log level of it.
    """
    restricted = f"{control.RESTRICTED}:{control.ADMIN_KEY}={secret}"
    limited = any(group.rate_limiter.resources for config in configs.values() for group in config.instance_group)
    return [
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in configs),
        f"--http-restricted-api={restricted}",
        f"--grpc-restricted-protocol={restricted}",
        "--metrics-config=summary_latencies=true",
        # Completing costs a process for each model.
        *(["--disable-auto-complete-config"] if all(map(complete, configs.values())) else []),
        *(["--rate-limit=execution_count"] if limited else []),
        *(listen.tls.options() if listen.tls else []),
        *LEVELS[listen.log_level],
    ]


def cache(configs: Mapping[str, ModelConfig], folder: Path | None) -> list[str]:
    """Return the options of the response cache, if a model asks for it; `folder` holds it where it is not built in."""
    if not any(config.response_cache.enable for config in configs.values()):
        return []
    return [*([f"--cache-directory={folder}"] if folder else []), f"--cache-config=local,size={CACHE_BYTES}"]


def complete(config: ModelConfig) -> bool:
    """Whether nothing is left in a configuration for Triton to complete; an ensemble states it elsewhere."""
    return bool(config.input and config.output)
