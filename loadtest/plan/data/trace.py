"""A trace: when requests were sent. Plain lines with a time in seconds each, or a recording with `at` in each line."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadtest.plan.data import files, recorded
from modelathe.errors import BadInput

_FIX = "write one time in seconds per line"


def read(path: Path, speed: float = 1.0) -> list[float]:
    """Return the send times of a trace, in seconds; the first request is due at 0, whatever its time says.

    Of plain lines the first column counts; empty ones, those that begin with `#` and a heading in the first line are
    skipped. A file that ends with .jsonl is recorded traffic.

    Args:
        path: the file.
        speed: 2 replays in half the time.

    Raises:
        BadInput: no such file, no times in it, or a line whose time is no number, negative or before the one above.
    """
    found: list[float] = []
    for number, written in (_recorded if path.suffix == ".jsonl" else _plain)(path):
        at = _seconds(written)
        if not 0 <= at < math.inf:
            raise BadInput(
                f"{written!r:.40} in line {number} is not a time", where=str(path), fix="write seconds, 0 or more"
            )
        if found and at < found[-1]:
            raise BadInput(f"line {number} is before the line above it", where=str(path), fix="sort the file by time")
        found.append(at)
    if not found:
        raise BadInput("has no times", where=str(path), fix=_FIX)
    return [(at - found[0]) / speed for at in found]


def length(times: list[float]) -> float:
    """Return how long a replay lasts: until its last request, and the mean gap after that; 1 s for a single moment."""
    return times[-1] * (1 + 1 / (len(times) - 1)) if times[-1] > 0 else 1.0


def _plain(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(files.text(path, _FIX).split("\n"), 1):
        column = re.split(r"[,;\s]", line.strip(), maxsplit=1)[0]
        heading = number == 1 and math.isnan(_seconds(column))
        if column and not column.startswith("#") and not heading:
            yield number, column


def _recorded(path: Path) -> Iterator[tuple[int, Any]]:
    return ((line.number, line.document.get("at", "")) for line in recorded.lines(path))


def _seconds(written: Any) -> float:
    """Return a time; NaN where it is none."""
    try:
        return float(written) if isinstance(written, int | float | str) and written is not True else math.nan
    except (ValueError, OverflowError):
        return math.nan
