"""Statistics: figures over arrays of seconds. Exact, from every request; nothing is binned or interpolated."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


def percentile(values: Seconds, percent: float) -> float:
    """Return the smallest observed value that `percent` of the values do not exceed; NaN when there are none."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if len(values) else float("nan")


def milliseconds(values: Seconds) -> dict[str, float]:
    """Return the mean and the usual percentiles of `values` (seconds) in milliseconds."""
    mean = float(values.mean()) if len(values) else float("nan")
    values = np.sort(values)  # once, not for each percentile
    return {"mean": mean * 1e3, **{name: percentile(values, at) * 1e3 for name, at in PERCENTILES.items()}}


def curve(values: Seconds, points: int = 200) -> tuple[NDArray[Any], Seconds]:
    """Return percentiles (0 to below 100) and the values there, ever denser towards the tail.

    The last percentile is the highest one that this many values can tell from their maximum.
    """
    nines = np.linspace(0, np.log10(max(len(values), 10)), points)
    percents = 100 * (1 - 10**-nines)
    return percents, np.percentile(np.sort(values), percents, method="inverted_cdf")


def windows(end: float, most: int) -> Seconds:
    """Return the edges of about `most` equal windows of a round width from 0 to `end`; the last may differ."""
    most = max(most, 1)
    width = next(width for width in _widths() if end <= width * most)
    edges = np.arange(0, end, width)
    # A sliver of a window at the end would show a rate made of two requests.
    return np.append(edges[:-1] if len(edges) > 1 and end - edges[-1] < width / 2 else edges, end)


def _widths() -> Iterator[float]:
    return (10.0**exponent * step for exponent in count(-3) for step in (1, 2, 5))
