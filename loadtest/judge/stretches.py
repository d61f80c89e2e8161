"""Stretches: how long a stretch of time must be to count as an independent witness of a run."""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

MOST = 10
"""Stretches that a run is cut into at most; longer ones are safer, and more of them hardly sharpen an interval."""
FEWEST = 6
"""Stretches below which nothing is said."""
_TIMES = 2.5
_WINDOW = 3.0
_LEAST_SPREAD = 3.0


def memory(series: Numbers) -> float:
    """Return the integrated autocorrelation time of a series of shape [n], in elements and at least 1.

    The sum of the autocorrelations ends at the first lag of `_WINDOW` times itself (A. Sokal, "Monte Carlo methods in
    statistical mechanics", 1997, chapter 3). In a short series it comes out too small, since the mean is the series'
    own; the last factor is U. Wolff's correction of that ("Monte Carlo errors with less errors", hep-lat/0306017).
    """
    centred = series - series.mean()
    variance = float(centred @ centred)
    if not variance > 0:
        return 1.0
    whole = np.correlate(centred, centred, "full")[len(series) :] / variance
    times = 1 + 2 * np.cumsum(whole[: len(series) // 2])
    reached = sum(1 for _ in takewhile(lambda at: at[0] < _WINDOW * at[1], enumerate(times, 1)))
    last = min(reached, len(times) - 1)
    return max(1.0, float(times[last])) * (1 + (2 * last + 3) / len(series))


@dataclass(frozen=True)
class Cut:
    """A run cut into stretches.

    Args:
        place: to which stretch each element belongs, ascending from 0, int64 of shape (elements,).
        freedom: degrees of freedom that the spread between the stretches has.
        why: the reason for which they cannot be trusted; empty if they can.
    """

    place: NDArray[np.int64]
    freedom: float
    why: str = ""


def cut(series: Numbers, remembers: float) -> Cut:
    """Return the stretches, each `_TIMES` as long as the run remembers itself or longer.

    Where few of them hold most of the differences, these few are the witnesses: the degrees of freedom are those of as
    many normal variables as would be as evenly spread.

    Args:
        series: what each short stretch of a run adds to a figure, or to the difference of two runs, of shape [n].
        remembers: `memory` of that, or of all figures that come from the same requests.
    """
    count = int(min(MOST, len(series) / (_TIMES * remembers)))
    place = np.arange(len(series)) * max(count, FEWEST) // len(series)
    if count < FEWEST:
        return Cut(place, 1.0, f"the runs are too short: only {max(count, 1)} stretches of them are independent")
    sums = np.abs(np.bincount(place, series))
    if not sums.any():
        return Cut(place, count - 1.0)
    evenly = float(sums.sum() ** 2 / (sums @ sums))
    few = "one or two moments make the whole difference; run longer" if evenly < _LEAST_SPREAD else ""
    return Cut(place, max(1.0, min(count, evenly * np.pi / 2) - 1), few)
