"""Processes: a server and those that it started; Triton runs its Python backends in processes of their own."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_RSS = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)


def children(pid: int) -> Iterator[int]:
    """Yield the ids of what a process started itself, also of what ended and was not asked for its end."""
    threads: list[Path] = []
    with suppress(OSError):
        threads = list(Path(f"/proc/{pid}/task").glob("*/children"))
    for path in threads:
        with suppress(OSError):  # that thread ended meanwhile
            yield from map(int, path.read_text().split())


def family(pid: int) -> list[int]:
    """Return the ids of a process and of all below it; empty if it is gone."""
    if not Path(f"/proc/{pid}").exists():
        return []
    return [pid, *(one for child in children(pid) for one in family(child))]


def resident(pids: Iterable[int]) -> int:
    """Return the bytes of memory that processes hold; pages that several share count once for each."""
    total = 0
    for pid in pids:
        with suppress(OSError):  # it ended meanwhile
            found = _RSS.search(Path(f"/proc/{pid}/status").read_text())
            total += int(found[1]) * 1024 if found else 0
    return total
