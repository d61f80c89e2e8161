"""Statistics: figures over arrays of seconds. Exact, from every request; nothing is binned or interpolated."""

from collections.abc import Iterator
from itertools import count
from math import ceil, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

CONFIDENCE = 0.95
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


_EXACT = 9
"""Decimals of a rank that are kept: 99.9 % of 1,000 is the 999th value, though 0.999 * 1000 is more than 999."""


def ranks(count: int, percents: NDArray[np.float64] | float) -> NDArray[np.int64]:
    """Return the index, from 0, of each percentile among `count` ascending values, `count` ≥ 1.

    It is that of the smallest value which at least so many percent of all values do not exceed.
    """
    wanted = np.ceil(np.round(np.asarray(percents) * count / 100, _EXACT)).astype(np.int64)
    return np.clip(wanted, 1, count) - 1


def percentile(values: Seconds, percent: float) -> float:
    """Return the smallest observed value that `percent` of the values do not exceed; NaN when there are none."""
    if not len(values):
        return float("nan")
    rank = int(ranks(len(values), percent))
    return float(np.partition(values, rank)[rank])


def milliseconds(values: Seconds) -> dict[str, float]:
    """Return the mean and the usual percentiles of `values` (seconds) in milliseconds."""
    if not len(values):
        return dict.fromkeys(("mean", *PERCENTILES), float("nan"))
    ordered = np.sort(values)[ranks(len(values), np.array([*PERCENTILES.values()]))]
    return {"mean": float(values.mean()) * 1e3, **dict(zip(PERCENTILES, (ordered * 1e3).tolist(), strict=True))}


def largest(count: int) -> list[str]:
    """Return the percentiles of `PERCENTILES`, as they are shown, that are the maximum of so few values."""
    return [
        key.replace("999", "99.9")
        for key, percent in PERCENTILES.items()
        if 90 < percent < 100 and count > 0 and ranks(count, percent) == count - 1
    ]


def needed(percent: float) -> int:
    """Return how many values it takes to say that a percentile lies below a limit, were all of them below it.

    With fewer, the share beyond the limit may be larger than 100 - `percent` and still show itself in none of them with
    a chance above 5 % (S. S. Wilks, "Determination of sample sizes for setting tolerance limits", 1941).
    """
    return ceil(log(1 - CONFIDENCE) / log(percent / 100)) if percent < 100 else 1


def curve(values: Seconds, points: int = 200) -> tuple[NDArray[Any], Seconds]:
    """Return percentiles (0 to below 100) and the values there, ever denser towards the tail.

    The last percentile is the highest one that this many values can tell from their maximum.
    """
    nines = np.linspace(0, np.log10(max(len(values), 10)), points)
    percents = 100 * (1 - 10**-nines)
    return percents, np.sort(values)[ranks(len(values), percents)]


def windows(end: float, most: int) -> Seconds:
    """Return the edges of about `most` equal windows of a round width from 0 to `end`; the last may differ."""
    most = max(most, 1)
    width = next(width for width in _widths() if end <= width * most)
    edges = np.arange(0, end, width)
    # A sliver of a window at the end would show a rate made of two requests.
    return np.append(edges[:-1] if len(edges) > 1 and end - edges[-1] < width / 2 else edges, end)


def _widths() -> Iterator[float]:
    return (10.0**exponent * step for exponent in count(-3) for step in (1, 2, 5))


def number(value: float | None) -> str:
    """Return a figure with three significant digits and without an exponent; a dash when there is none."""
    if value is None or value != value:
        return "-"
    if np.isinf(value):
        return "inf"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{digits}f}"
