"""Connection: how requests reach a server: encryption, headers, compression, streams, shared memory.

The questions of `modelathe.client` and the load of `loadtest.send` use the same one.
"""

import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from modelathe.errors import BadInput, UsageError

COMPRESSIONS = ("gzip", "deflate")
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
"""gRPC's options for messages of any size; its own limit is 4 MiB, and that of Triton and its clients 2 GiB."""
CHANNEL = (
    *UNLIMITED,
    *(("grpc.max_metadata_size", 2**20), ("grpc.absolute_max_metadata_size", 2**20)),
    ("grpc.enable_http_proxy", 0),
)
"""The options of each of our gRPC channels; the library would obey http_proxy even for a loopback address."""
MEMORIES = ("system", "cuda")
HOST = ("host", ":authority")
"""What HTTP/1.1 and HTTP/2 call the name that a request is for, which stands in it once."""
FRAMING = "content-type content-length content-encoding inference-header-content-length transfer-encoding connection te"
"""Headers that say how a request is written, which is not the user's to say."""


class Address(NamedTuple):
    """A URL's parts: `grpc` or `http`, `HOST:PORT`, and whether it is encrypted."""

    protocol: str
    place: str
    encrypted: bool


def address(url: str) -> Address:
    """Split `grpc://HOST:PORT`, `grpcs://`, `http://` or `https://`; HTTP may have a path, see `base`.

    Raises:
        UsageError: another scheme, no port, or something behind the port that cannot be.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    protocol = parts.scheme.removesuffix("s")
    below = parts.path.strip("/")
    wrong = parts.query or (below and (protocol != "http" or not re.fullmatch(r"[\w.~%/-]+", below, re.ASCII)))
    if protocol not in ("grpc", "http") or not parts.hostname or not port or wrong:
        fix = "write grpc://HOST:PORT or http://HOST:PORT, with grpcs or https where the server encrypts"
        raise UsageError("not the address of a server", where=url, fix=fix)
    return Address(protocol, parts.netloc, parts.scheme.endswith("s"))


def base(url: str) -> str:
    """Return the path below which an HTTP server has its own, as behind an ingress: `/team`; empty for most."""
    below = urlsplit(url).path.strip("/")
    return f"/{below}" if below else ""


@dataclass(frozen=True)
class Connection:
    """How requests reach a server.

    Args:
        authority: file of the certificates that the server's is checked with; None takes the machine's own.
        certificate: file of the client's certificate, for a server that asks for one.
        key: file of its key.
        headers: names and values that go with every request: HTTP headers, or gRPC metadata (names in small letters).
            `Host` or `:authority` is the name that requests are for, where that is not the address.
        compression: one of `COMPRESSIONS`, of requests, and of answers where the server does it; None leaves them.
        streams: gRPC: how many `ModelStreamInfer` streams carry the requests; 0 makes a call of each. A request of a
            decoupled model is over with its last response.
        shared_memory: one of `MEMORIES`: tensors go through memory that this machine's server reads and writes; None
            sends them.
        binary: HTTP: whether tensors travel as bytes, which is an extension of the protocol; otherwise as JSON.
    """

    authority: str | None = None
    certificate: str | None = None
    key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    compression: str | None = None
    streams: int = 0
    shared_memory: str | None = None
    binary: bool = True

    def __post_init__(self) -> None:
        # JSON knows only lists.
        object.__setattr__(self, "headers", tuple((name, value) for name, value in self.headers))
        for name, value in self.headers:
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+|:authority", name) or not re.fullmatch(r"[ -~]*", value):
                raise UsageError(f"the header {name!r} cannot be sent", fix="use plain letters, no line breaks")
            if name.lower() in FRAMING.split():
                raise UsageError(f"the header {name} says how a request is written, as it is not", fix="leave it out")
        if len([name for name, _ in self.headers if name.lower() in HOST]) > 1:
            raise UsageError("two headers say which name the requests are for", fix="give Host, or :authority, once")
        for name, found, known in (
            ("compression", self.compression, COMPRESSIONS),
            ("shared memory", self.shared_memory, MEMORIES),
        ):
            if found is not None and found not in known:
                raise UsageError(f"there is no {name} {found!r}", fix=f"use {' or '.join(known)}")
        if self.streams < 0:
            raise UsageError(f"{self.streams} streams", fix="give 0 or more")
        if bool(self.certificate) != bool(self.key):
            raise UsageError("a certificate without its key, or the reverse", fix="give both files")

    def check(self, url: str) -> None:
        """Refuse what does not go with the address.

        Raises:
            UsageError: files without encryption, or streams without gRPC.
            BadInput: a file is missing or holds no certificate.
        """
        protocol, _, encrypted = address(url)
        files = [file for file in (self.authority, self.certificate, self.key) if file]
        if files and not encrypted:
            fix = f"write {protocol}s:// if the server encrypts"
            raise UsageError("certificates are given, but the address is not encrypted", where=url, fix=fix)
        for file in files:
            if not Path(file).is_file():
                raise BadInput("there is no such file", where=file, fix="give a PEM file")
        if self.streams and protocol != "grpc":
            raise UsageError("streams are a matter of gRPC", where=url, fix="give the server's gRPC address")
        if encrypted:
            self.tls()

    @property
    def host(self) -> str:
        """The name that requests are for; empty where it is the address."""
        return next((value for name, value in self.headers if name.lower() in HOST), "")

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """The headers without that name."""
        return tuple((name, value) for name, value in self.headers if name.lower() not in HOST)

    def channel(self) -> list[tuple[str, Any]]:
        """Return the options of a gRPC channel."""
        return [*CHANNEL, *([("grpc.default_authority", self.host)] if self.host else [])]

    def hidden(self) -> "Connection":
        """Return it with the headers' values left out, as it may be written down: one could be a secret."""
        return replace(self, headers=tuple((name, "hidden") for name, _ in self.headers))

    def tls(self, make: Callable[..., ssl.SSLContext] = ssl.create_default_context) -> ssl.SSLContext:
        """Return what HTTP encrypts with.

        Raises:
            BadInput: a file holds no certificate or key.
        """
        try:
            context = make(cafile=self.authority)
            if self.certificate:
                # Without a function it would ask for the password of an encrypted key on the terminal.
                context.load_cert_chain(self.certificate, self.key, lambda: "")
        except (ssl.SSLError, ValueError) as error:
            where = ", ".join(filter(None, (self.authority, self.certificate, self.key)))
            raise BadInput(f"no certificate that can be used: {error}", where=where, fix="give PEM files") from error
        return context

    def gevent_tls(self, **_: Any) -> ssl.SSLContext:
        """Return the same for sockets of gevent, which tritonclient's HTTP uses; it ignores what that asks for."""
        from gevent.ssl import create_default_context

        return self.tls(create_default_context)

    def credentials(self) -> Any:
        """Return what gRPC encrypts with."""
        import grpc

        root, key, chain = (
            Path(file).read_bytes() if file else None for file in (self.authority, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(root, key, chain)


PLAIN = Connection()
