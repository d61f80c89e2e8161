"""Edge: at which rate a share of bad requests passes what is allowed, from a few short probes.

The share of bad requests (too slow, failed, dropped) grows with the rate. The waiting times of a queue have an
exponential tail, so near the edge the logarithm of the share is taken as a straight line in the rate::

    ln share(rate) = ln allowed * (1 - slope * (rate / edge - 1))

which is a psychometric curve whose threshold is the edge, and it is found as such curves are: a posterior on a grid
over edge and slope, flat in the logarithm of the edge, and each probe placed near the edge as known so far (Kontsevich
and Tyler, "Bayesian adaptive estimation of psychometric slope and threshold", Vision Research 39, 1999). The line of a
queue M/M/1 is exact, and its slope is load / (1 - load).

Two things make probes say less than as many independent requests would. Bad requests come in clusters, one busy moment
makes many: the likelihood is raised to the power 1 / spread, where spread is how much more the counts of stretches of
time vary (quasi-likelihood; McCullagh and Nelder, "Generalized Linear Models", 1989, 4.5). And the server is not the
same in all probes, its clock, caches and neighbours change: each probe has an edge of its own, which lies off the
common one by a normal error in its logarithm (a random effect; the same book, 14.5). How large that error is, is found
with the edge: it is the third axis of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from scipy.special import betainc, expit, logit, xlog1py, xlogy

Numbers = NDArray[np.float64]
BLOCKS = 10
"""Stretches of time that a probe is cut into."""

LEAST_ALLOWED = 1e-4
"""`errors == 0` cannot be searched for; the edge of one in so many stands for it."""

_STEP = 0.008
"""Of the grid, in the logarithm of the rate."""

_SLOPES = np.geomspace(0.4, 160.0, 18)
_PRIOR = -0.5 * (np.log(_SLOPES / 2.0) / np.where(_SLOPES < 2.0, 1.0, 2.0)) ** 2
"""Slopes, and what is thought of them before any probe: one as steep as a step is not odd, a flat one is."""

_MOVES = np.array([0.0, 0.02, 0.04, 0.07, 0.11, 0.16])
_MOVES_PRIOR = np.log(np.gradient(_MOVES)) - 0.5 * (_MOVES / 0.12) ** 2
"""Standard deviations of the logarithm of the edge between probes, and what is thought of them before any."""

_TAILS = 3.0
_FAR = np.log(10.0)
_TINY = 1e-12
_CAUTION = 1.3
_PRIOR_SPREAD, _PRIOR_WEIGHT = 2.0, 10.0


@dataclass(frozen=True)
class Counts:
    """What one probe says of one condition.

    Args:
        rate: requests per second that were due.
        counted: requests of each stretch of time that the condition speaks of, int64 of shape (blocks,).
        bad: how many of them were bad, likewise.
    """

    rate: float
    counted: NDArray[np.int64]
    bad: NDArray[np.int64]


@dataclass(frozen=True)
class Edge:
    """How sure we are of the edge: `chance[i]` is the probability that it lies below `rates[i]`."""

    rates: Numbers
    chance: Numbers

    def at(self, chance: float) -> float:
        """Return the rate that the edge is below with this probability."""
        return float(np.interp(chance, self.chance, self.rates))


def edge(probes: Sequence[Counts], allowed: float, rates: Numbers) -> Edge:
    """Return what the probes say of the rate at which the share of bad requests is `allowed`."""
    each = _likelihoods(probes, allowed, rates)
    found = np.array([_moved(each, moves).sum(axis=0) for moves in _MOVES])
    found += _PRIOR[:, None] + _MOVES_PRIOR[:, None, None]
    marginal = np.exp(found - found.max()).sum(axis=(0, 1))
    return Edge(rates, np.cumsum(marginal) / marginal.sum())


def _likelihoods(probes: Sequence[Counts], allowed: float, rates: Numbers) -> Numbers:
    """Return the log-likelihood of each probe for each slope and edge, of shape (probes, slopes, rates).

    The line is one only near the edge. Beyond, a queue grows for as long as the probe lasts, and far below hardly
    anything happens: there the share says "more than that" or "less than that" and no more.
    """
    x = np.array([probe.rate for probe in probes])[:, None, None]
    n = np.array([probe.counted.sum() for probe in probes], dtype=np.float64)
    k = np.array([probe.bad.sum() for probe in probes], dtype=np.float64)
    less, more = expit(logit(allowed) - _FAR), expit(logit(allowed) + _FAR)
    below, beyond = k < less * n, k > more * n
    wide = spread([probe for probe, far in zip(probes, below | beyond, strict=True) if not far])
    n, k = n[:, None, None] / wide, k[:, None, None] / wide
    line = np.log(allowed) * (1 - _SLOPES[:, None] * (x / rates - 1))
    share = np.exp(np.minimum(line, np.log((1 + more) / 2)))  # it ends where every request is bad
    found = xlogy(k, share) + xlog1py(n - k, -share)
    found[beyond] = _at_least(np.ceil(more * n[beyond]), n[beyond], share[beyond])
    found[below] = _at_least(np.ceil((1 - less) * n[below]), n[below], 1 - share[below])
    return np.asarray(found)


def _at_least(count: Numbers, n: Numbers, share: Numbers) -> Numbers:
    """Return the logarithm of the chance that `count` or more of `n` are of a kind that has this share."""
    return np.asarray(np.log(np.maximum(betainc(count, np.maximum(n - count, 0.0) + 1, share), _TINY)))


def _moved(each: Numbers, moves: float) -> Numbers:
    """Return the log-likelihoods if each probe has an edge of its own, off the common one by chance."""
    if not moves:
        return each
    most = each.max(axis=-1, keepdims=True)
    mixed = gaussian_filter1d(np.exp(each - most), moves / _STEP, mode="nearest", truncate=_TAILS)
    return np.asarray(np.log(np.maximum(mixed, _TINY)) + most)


def grid(rates: Sequence[float]) -> Numbers:
    """Return the rates among which the edge is looked for: somewhat beyond all that were tried."""
    low, high = np.log(min(rates) / 2), np.log(max(rates) * 2)
    return np.asarray(np.exp(np.arange(low, high, _STEP)))


def first(edges: Sequence[Edge], level: float) -> tuple[float, float, float]:
    """Return the lowest of several edges, and the ends of an interval that holds it.

    The edges come from the same probes, so their errors depend on each other in a way that nobody knows; these ends
    hold whatever it is. The lowest edge lies above the lowest of the low ends if its own does. It lies below the lowest
    of the high ends if all of them do: each gets its part of the chance to miss (Bonferroni's inequality).

    Args:
        edges: one for each condition.
        level: the probability that the interval holds the lowest edge.
    """
    tail = (1 - level) / 2
    at = (0.5, tail, 1 - tail / len(edges))
    rate, low, high = (min(one.at(chance) for one in edges) for chance in at)
    return rate, low, high


def spread(probes: Sequence[Counts]) -> float:
    """Return how many times as much the counts of bad requests vary as those of independent ones would.

    Pearson's statistic over the stretches of all probes; a few unlucky stretches must not say much, so it is drawn
    towards what a queue usually shows.
    """
    statistic, freedom = _PRIOR_SPREAD * _PRIOR_WEIGHT, _PRIOR_WEIGHT
    for probe in probes:
        n, k = probe.counted.sum(), probe.bad.sum()
        if not 0 < k < n:
            continue
        expected, used = probe.counted * k / n, probe.counted > 0
        statistic += float(((probe.bad - expected)[used] ** 2 / expected[used]).sum() / (1 - k / n))
        freedom += used.sum() - 1
    return max(1.0, _CAUTION * statistic / freedom)
