"""Memory: what the server uses while a run goes on, sampled by a process of its own.

Two sources: the processes of a pid and its children, through /proc; or Triton's metric `nv_cpu_memory_used_bytes`,
which is the memory of the whole machine, other programs included. A process, because a thread would take the
interpreter from the sender at random moments.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from select import select
from urllib.parse import urlsplit

import numpy as np

from loadtest.load import metrics, processes
from loadtest.record.statistics import Seconds
from modelathe import interpreter
from modelathe.errors import UsageError

_PATIENCE = 2.0


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
        return lambda: float(processes.resident(processes.family(int(source))))

    def ask() -> float:
        parts = urlsplit(source)
        if not parts.port:
            raise ValueError("there is no port in its address")
        found = list(metrics.samples(metrics.page(parts.netloc, _PATIENCE), [metrics.MACHINE_USED]))
        if not found:
            raise ValueError(f"there is no {metrics.MACHINE_USED}")
        return found[0].value

    return ask


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
