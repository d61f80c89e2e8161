"""Memory: what the server uses while a run goes on, sampled by a process of its own.

Two sources: the processes of a pid and its children, through /proc; or Triton's metric `nv_cpu_memory_used_bytes`,
which is the memory of the whole machine, other programs included. A process, because a thread would take the
interpreter from the sender at random moments.
"""

import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from select import select

import numpy as np

from loadtest.record.statistics import Seconds
from modelathe import interpreter
from modelathe.errors import UsageError

_METRIC = re.compile(r"^nv_cpu_memory_used_bytes(?:\{[^}]*\})?\s+([0-9.eE+]+)", re.MULTILINE)
_RSS = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Memory:
    """Samples of the server's memory: `at` in seconds after the first and `used` in bytes, both of shape [n].

    Args:
        source: where they come from, in words; empty when there is no source.
    """

    source: str
    at: Seconds = field(default_factory=lambda: np.empty(0))
    used: Seconds = field(default_factory=lambda: np.empty(0))


def reader(source: str) -> Callable[[], float]:
    """Return the function that reads the bytes in use from `source`: a pid, or the URL of a metrics endpoint.

    It raises OSError or ValueError when there is nothing to read.
    """
    if source.isdigit():
        return lambda: float(sum(map(_resident, _family(int(source)))))

    url = source.rstrip("/").removesuffix("/metrics") + "/metrics"

    def ask() -> float:
        # No proxy of the environment stands before a server's metrics.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=2) as answer:
            found = _METRIC.search(answer.read().decode("utf-8", "replace"))
        if not found:
            raise ValueError("there is no nv_cpu_memory_used_bytes")
        return float(found[1])

    return ask


def _resident(pid: int) -> int:
    try:
        found = _RSS.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0  # it ended meanwhile
    return int(found[1]) * 1024 if found else 0


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started: Triton runs Python backends in processes of their own."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


@contextmanager
def watched(source: str, every: float = 1.0) -> Iterator[Memory]:
    """Sample `source` each `every` seconds until the block ends; the samples are there after it.

    Raises:
        UsageError: nothing can be read from `source`, which is the user's own word.
    """
    memory = Memory(source)
    if not source:
        yield memory
        return
    try:
        if not reader(source)():
            raise ValueError("there is no such process")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the server's memory cannot be read: {error}",
            where=source,
            fix="give --pid of the server on this machine, or --metrics http://HOST:8002/metrics",
        ) from error
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            interpreter.command("loadtest.load.memory", source, str(every)),
            stdin=subprocess.PIPE,
            stdout=file,
            env=interpreter.variables(),
            start_new_session=True,
        )
        try:
            yield memory
        finally:
            process.communicate()  # the end of its input is the sign to stop
            file.seek(0)
            rows = np.array([line.split() for line in file if line.endswith("\n")], dtype=float).reshape(-1, 2)
            memory.at, memory.used = rows[:, 0], rows[:, 1]


def _sample(source: str, every: float) -> None:
    """Print time and bytes until standard input ends, which it does at the latest with whoever asked."""
    read, start = reader(source), time.monotonic()
    while not select([sys.stdin], [], [], every)[0]:
        try:
            used = read()
        except (OSError, ValueError):
            continue  # a server too busy to answer is no reason to stop looking
        print(f"{time.monotonic() - start:.3f} {used:.0f}", flush=True)


if __name__ == "__main__":
    _sample(sys.argv[1], float(sys.argv[2]))
