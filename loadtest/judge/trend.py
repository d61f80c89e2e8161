"""Trend: whether a series over time climbs, falls or jumps. Pure functions over equally important figures.

None of the tests asks for a distribution. Neighbouring figures of a server are not independent, which makes small
p-values cheap; so whoever judges by them also asks that the change is large enough to matter.
"""

from dataclasses import dataclass

import numpy as np

from loadtest.record.statistics import Seconds

FEWEST = 8
"""Figures below which no trend is looked for."""


@dataclass(frozen=True)
class Trend:
    """A straight line through a series.

    Args:
        change: from its begin to its end, as a share of the series' median; `low` and `high` are its 95 % interval.
        p: chance of so clear an order without any trend.
    """

    change: float
    low: float
    high: float
    p: float


def line(at: Seconds, values: Seconds) -> Trend:
    """Return the trend of `values` at the times `at`, both of shape [n] with n ≥ `FEWEST`.

    The slope is the median of the slopes between all pairs, with its interval (P. K. Sen, J. Am. Stat. Assoc. 63, 1968,
    after H. Theil); the test is that of Mann and Kendall (H. B. Mann, Econometrica 13, 1945), which is Kendall's tau
    between the values and the time.
    """
    from scipy.stats import kendalltau, theilslopes

    slope, _, low, high = theilslopes(values, at, alpha=0.95)
    scale = float(at[-1] - at[0]) / float(np.median(values))
    p = float(kendalltau(at, values).pvalue)
    # All values equal have no order, and scipy says NaN.
    return Trend(slope * scale, low * scale, high * scale, 1.0 if np.isnan(p) else p)


@dataclass(frozen=True)
class Jump:
    """The moment at which a series changed its level most: before index `at` and from it on.

    Args:
        at: index of the first figure after the change.
        ratio: median after over median before.
        p: chance of so clear a change without any.
    """

    at: int
    ratio: float
    p: float


def jump(values: Seconds) -> Jump:
    """Return the clearest change of level in `values` of shape [n] with n ≥ `FEWEST`.

    The test is that of Pettitt (A. N. Pettitt, J. R. Stat. Soc. C 28, 1979) with its approximate p-value.
    """
    from scipy.stats import rankdata

    n = len(values)
    places = np.arange(1, n)
    gaps = np.abs(2 * np.cumsum(rankdata(values))[:-1] - places * (n + 1))
    at = int(places[np.argmax(gaps)])
    p = min(1.0, 2 * float(np.exp(-6 * float(gaps.max()) ** 2 / (n**3 + n**2))))
    return Jump(at, float(np.median(values[at:]) / np.median(values[:at])), p)
