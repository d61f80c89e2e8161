"""Intervals: how far chance moves the figures of one simulation, from slices of its time (batch means).

A slice lasts many times the longest limit, so that its figure hardly depends on the slice before.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from loadtest.record import statistics
from loadtest.record.statistics import PERCENTILES, needed
from serve.simulate.service import Seconds

SLICES = 10
STUDENT = 2.262
"""The quantile .975 of Student's distribution with one degree of freedom less than there are slices."""
Slices = npt.NDArray[np.int8]
Interval = tuple[float, float]


def slices(at: Seconds, begin: float, end: float) -> Slices:
    """Return the slice in which each request comes, int8 [n].

    Args:
        at: times of arrival, float64 [n], from `begin` on.
        begin: the first time that counts.
        end: the last.
    """
    share = (at - begin) / (end - begin) * SLICES if end > begin else np.zeros(len(at))
    return np.minimum(share, SLICES - 1).astype(np.int8)


def of(latencies: Seconds, which: Slices, whole: Mapping[str, float]) -> dict[str, Interval]:
    """Return the 95 % intervals of the mean and the percentiles, in milliseconds, that each slice can tell.

    Args:
        latencies: seconds, float64 [n]; infinite of a request that failed.
        which: the slice of each.
        whole: the figures of all of them, as `loadtest.record.statistics.milliseconds` returns them.
    """
    parts = [latencies[which == number] for number in range(SLICES)]
    fewest = min(map(len, parts))
    figures = [statistics.milliseconds(part) for part in parts]
    told = [key for key in whole if key != "max" and fewest >= needed(PERCENTILES.get(key, 50.0))]
    return {key: around(whole[key], [figure[key] for figure in figures]) for key in told}


def failures(failed: npt.NDArray[np.bool_], which: Slices) -> Interval:
    """Return the 95 % interval of how many requests failed: up to three where none did (the rule of three)."""
    if not failed.any():
        return 0.0, 3.0
    counts = np.maximum(np.bincount(which, minlength=SLICES), 1)
    low, high = around(float(failed.mean()), (np.bincount(which[failed], minlength=SLICES) / counts).tolist())
    return max(0.0, low) * len(failed), high * len(failed)


def around(value: float, parts: list[float]) -> Interval:
    """Return the 95 % interval of a figure whose parts are alike; infinite where one of them is."""
    if not np.isfinite([value, *parts]).all():
        finite = [part for part in parts if np.isfinite(part)]
        return min(finite, default=np.inf), np.inf
    half = STUDENT * float(np.std(parts, ddof=1)) / len(parts) ** 0.5
    return value - half, value + half
