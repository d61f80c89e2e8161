"""Edge: at which rate a share of bad requests passes what is allowed, from a few short probes.

The share of bad requests (too slow, failed, dropped) grows with the rate. Near the edge its log-odds are taken as a
straight line in the logarithm of the rate::

    logit share(rate) = logit allowed + slope * ln(rate / edge)

which is a psychometric curve whose threshold is the edge, and it is found as such curves are: a posterior on a grid
over edge and slope, flat in both logarithms, and each probe placed near the edge as known so far (Kontsevich and Tyler,
"Bayesian adaptive estimation of psychometric slope and threshold", Vision Research 39, 1999). Bad requests come in
clusters, one busy moment makes many. So the likelihood is raised to the power 1 / spread, where spread is how much more
the counts of stretches of time vary than independent requests' would (quasi-likelihood; McCullagh and Nelder,
"Generalized Linear Models", 1989, 4.5).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, expit, logit, xlog1py, xlogy

Numbers = NDArray[np.float64]
BLOCKS = 10
"""Stretches of time that a probe is cut into."""

LEAST_ALLOWED = 1e-4
"""`errors == 0` cannot be searched for; the edge of one in so many stands for it."""

_STEP = 0.008
_SLOPES = np.geomspace(2.0, 200.0, 14)
_PRIOR = -0.5 * (np.log(_SLOPES / 12.0) / 0.9) ** 2
_FAR = 10.0
_TINY = 1e-12
_CAUTION = 1.6
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
    x = np.log([probe.rate for probe in probes])[:, None, None]
    n = np.array([probe.counted.sum() for probe in probes], dtype=np.float64)[:, None, None]
    k = np.array([probe.bad.sum() for probe in probes], dtype=np.float64)[:, None, None]
    far = (k > _FAR * allowed * n).ravel()
    wide = spread([probe for probe, away in zip(probes, far, strict=True) if not away])
    share = expit(logit(allowed) + _SLOPES[:, None] * (x - np.log(rates)))
    counted = (xlogy(k, share) + xlog1py(n - k, -share))[~far].sum(axis=0) / wide
    # Far above the edge a queue grows for as long as the probe lasts: its share says "more than that" and no more.
    most = np.ceil(_FAR * allowed * n[far] / wide)
    beyond = np.log(np.maximum(betainc(most, np.maximum(n[far] / wide - most, 0.0) + 1, share[far]), _TINY)).sum(axis=0)
    likelihood = counted + beyond + _PRIOR[:, None]
    marginal = np.exp(likelihood - likelihood.max()).sum(axis=0)
    return Edge(rates, np.cumsum(marginal) / marginal.sum())


def grid(rates: Sequence[float]) -> Numbers:
    """Return the rates among which the edge is looked for: somewhat beyond all that were tried."""
    low, high = np.log(min(rates) / 2), np.log(max(rates) * 2)
    return np.asarray(np.exp(np.arange(low, high, _STEP)))


def first(edges: Sequence[Edge]) -> Edge:
    """Return the lowest of several edges over the same rates: it is below a rate unless all of them are above."""
    beyond = np.prod([1 - edge.chance for edge in edges], axis=0)
    return Edge(edges[0].rates, 1 - beyond)


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
