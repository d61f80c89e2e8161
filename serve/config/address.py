"""Address: that of a server on this machine, which does not encrypt."""

from modelathe.connection import address, base
from modelathe.errors import UsageError


def parse_url(url: str) -> tuple[str, str]:
    """Split `grpc://HOST:PORT` or `http://HOST:PORT` into the scheme and `HOST:PORT`.

    Raises:
        UsageError: another scheme, also an encrypted one, no port, or something behind the port.
    """
    protocol, place, encrypted = address(url)
    if encrypted or base(url):
        raise UsageError(
            "not the address of a plain server", where=url, fix="write grpc://HOST:PORT or http://HOST:PORT"
        )
    return protocol, place
