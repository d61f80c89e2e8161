"""Queues whose capacity is known, simulated: what a search is measured against."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.probing import edge
from loadtest.probing.search import Probe

OVERHEAD = 1.0


def fixed_edge(service: float, limit: float, share: float) -> float:
    """Return the rate at which `share` of the requests of a queue M/D/1 take longer than `limit`, in requests/s.

    The distribution of its waiting times is Erlang's of 1909, as in Crommelin, "Delay probability formulae when the
    holding times are constant", Post Office Electrical Engineers' Journal 25, 1932. Its sum alternates: the limit
    should be no more than some twenty service times.
    """
    waits = limit / service - 1
    low, high = 0.0, 1.0
    for _ in range(60):
        load = (low + high) / 2
        late = 1 - (1 - load) * sum(
            (load * (j - waits)) ** j / math.factorial(j) * math.exp(load * (waits - j)) for j in range(int(waits) + 1)
        )
        low, high = (load, high) if late < share else (low, load)
    return low / service


def random_edge(service: float, limit: float, share: float) -> float:
    """Return the same for a queue M/M/1, whose time in the system is exponential."""
    return 1 / service - math.log(1 / share) / limit


def random_limit(service: float, rate: float, share: float) -> float:
    """Return the limit in seconds that `share` of the requests of a queue M/M/1 pass at a rate."""
    return math.log(1 / share) / (1 / service - rate)


class Queue:
    """One server in front of which requests wait; `probe` runs it from empty, and `seconds` adds up what that took.

    Args:
        service: median of the seconds that a request takes.
        limits: seconds that a request may take, one for each condition.
        fixed: whether all requests of a probe take equally long; else their times are exponential.
        seed: equal seeds give equal queues.
        moves: by what share the service time moves from probe to probe (standard deviation of its logarithm), as that
            of a machine does whose clock, cache and neighbours change.
    """

    def __init__(self, service: float, limits: Sequence[float], fixed: bool, seed: int, moves: float = 0.0) -> None:
        self.service, self.limits, self.fixed, self.moves = service, limits, fixed, moves
        self.rng, self.seconds = np.random.default_rng(seed), 0.0

    def probe(self, rate: float, seconds: float) -> Probe:
        """Return what a probe of a real server would say of the conditions."""
        settle = 0.5
        count = self.rng.poisson(rate * (seconds + settle))
        at = np.sort(self.rng.uniform(0, seconds + settle, count))
        latency = self._latency(at)
        self.seconds += seconds + settle + OVERHEAD
        kept = at >= settle
        block = ((at[kept] - settle) / seconds * edge.BLOCKS).astype(int)
        counted = np.bincount(block, minlength=edge.BLOCKS)
        bad = [np.bincount(block[latency[kept] > limit], minlength=edge.BLOCKS) for limit in self.limits]
        with np.errstate(invalid="ignore"):
            mean = np.bincount(block, latency[kept], edge.BLOCKS) / counted
        return Probe(rate, np.array([counted] * len(bad)), np.array(bad), mean)

    def _latency(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        service = self.service * math.exp(self.moves * self.rng.standard_normal())
        times = np.full(len(at), service) if self.fixed else self.rng.exponential(service, len(at))
        worked = np.cumsum(times)
        # Lindley: a request ends when all since the last idle moment are worked off.
        return worked + np.maximum.accumulate(at - (worked - times)) - at
