"""Blame: which part of how a server is asked it does not take, found out by asking it once more without.

What a server says of a part that it does not know (headers that are too long, a compressed body, a call that is
Triton's alone) names another cause as a rule, or none.
"""

from collections.abc import Callable
from dataclasses import replace

from modelathe.connection import Connection
from modelathe.errors import ModelatheError, ServerNonsense, UsageError

LONG_HEADERS = 4096
"""Bytes of headers from which on a server that does not answer is asked without them."""


Again = Callable[[Connection, str], object]
"""Asks a server the same over another connection, and another version of the model."""


def headers(again: Again, url: str, connection: Connection, error: ModelatheError) -> None:
    """Raise a `UsageError` if the server answers where the headers are left out, which are long.

    Args:
        again: asks it once more.
        url: its address.
        connection: over which it was asked.
        error: that came of it.
    """
    size = sum(len(name) + len(value) + 4 for name, value in connection.headers)
    if size >= LONG_HEADERS and _answers(again, replace(connection, headers=()), ""):
        what = f"the server answers without the {size:,} bytes of headers, and not with them"
        raise UsageError(what, where=url, fix="give shorter ones: Triton takes 8,192 bytes in all") from error


def options(again: Again, url: str, connection: Connection, version: str, error: ModelatheError) -> None:
    """Raise a `UsageError` if the server answers a request where one of the options that shape it is left out.

    Args:
        again: sends it once more.
        url: the server's address.
        connection: over which it was sent.
        version: to which it was sent.
        error: that came of it.
    """
    others: list[tuple[str, Connection, str]] = []
    if connection.compression:
        others.append((f"--compression {connection.compression}", replace(connection, compression=None), version))
    if connection.streams:
        others.append((f"--streams {connection.streams}", replace(connection, streams=0), version))
    if version and isinstance(error, ServerNonsense):
        others.append((f"--version {version}", connection, ""))
    for name, other, number in others:
        # A server that has too much to do for a moment would be blamed for the option.
        if _answers(again, other, number) and not _answers(again, connection, version):
            fix = f"leave {name.partition(' ')[0]} away"
            raise UsageError(f"the server answers without {name}, and not with it", where=url, fix=fix) from error


def _answers(again: Again, connection: Connection, version: str) -> bool:
    try:
        again(connection, version)
    except ModelatheError:
        return False
    return True
