"""Metrics: the `/metrics` page of a Triton server, in Prometheus's text format."""

import http.client
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

MACHINE_USED = "nv_cpu_memory_used_bytes"
"""What is used on the whole machine, by whatever runs there."""
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Sample(NamedTuple):
    """A line of the page."""

    name: str
    labels: dict[str, str]
    value: float


def page(place: str, timeout: float) -> str:
    """Return the page of the server at `place` (`HOST:PORT`), asked for without a proxy, within `timeout` seconds.

    Raises:
        OSError: nothing answers.
        ValueError: what answers has no such page.
    """
    connection = http.client.HTTPConnection(place, timeout=timeout)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"the answer is HTTP {response.status}")
        return response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ValueError(f"the answer is not HTTP: {error!r}") from error
    finally:
        connection.close()


def samples(text: str, names: Iterable[str] = ()) -> Iterator[Sample]:
    """Yield the lines of a page that hold a value, or those of the metrics in `names` alone.

    Raises:
        ValueError: a value is no number.
    """
    for name, labels, value in _lines(tuple(names)).findall(text):
        yield Sample(name, dict(_LABEL.findall(labels)), float(value))


@lru_cache
def _lines(names: tuple[str, ...]) -> re.Pattern[str]:
    # A parser for the whole format takes ten times as long, and a load reads its pages between two requests.
    return re.compile(rf"^({'|'.join(names) or '[a-zA-Z_:][a-zA-Z0-9_:]*'})(?:{{(.*)}})? (\S+)", re.MULTILINE)
