"""Queues whose capacity is known, simulated: what a search is measured against."""

import math

import numpy as np
from numpy.typing import NDArray

from loadtest import edge
from loadtest.capacity import Probe

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


class Queue:
    """One server in front of which requests wait; `probe` runs it from empty, and `seconds` adds up what that took."""

    def __init__(self, service: float, limit: float, fixed: bool, seed: int) -> None:
        self.service, self.limit, self.fixed = service, limit, fixed
        self.rng, self.seconds = np.random.default_rng(seed), 0.0

    def probe(self, rate: float, seconds: float) -> Probe:
        """Return what a probe of a real server would say of one condition."""
        settle = 0.5
        count = self.rng.poisson(rate * (seconds + settle))
        at = np.sort(self.rng.uniform(0, seconds + settle, count))
        latency = self._latency(at)
        self.seconds += seconds + settle + OVERHEAD
        kept = at >= settle
        block = ((at[kept] - settle) / seconds * edge.BLOCKS).astype(int)
        counted = np.bincount(block, minlength=edge.BLOCKS)
        bad = np.bincount(block, latency[kept] > self.limit, edge.BLOCKS).astype(np.int64)
        with np.errstate(invalid="ignore"):
            mean = np.bincount(block, latency[kept], edge.BLOCKS) / counted
        return Probe(rate, counted[None], bad[None], mean)

    def _latency(self, at: NDArray[np.float64]) -> NDArray[np.float64]:
        times = np.full(len(at), self.service) if self.fixed else self.rng.exponential(self.service, len(at))
        worked = np.cumsum(times)
        # Lindley: a request ends when all since the last idle moment are worked off.
        return worked + np.maximum.accumulate(at - (worked - times)) - at
