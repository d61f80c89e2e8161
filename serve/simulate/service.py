"""How long a call takes: measured times by batch size, resampled.

A mean gives a p99 that is too low; that is why each simulated call takes a time that was measured.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]
_BLOCK = 4096


@dataclass(frozen=True)
class Curve:
    """The times of a model's calls on one machine, with a number of threads.

    Args:
        calls: seconds of each measured call, float64 [n], by batch size; n ≥ 1, sizes ≥ 1.
        together: how many times longer a call takes while 1, 2, … instances run; the last counts for more of them.
        inside: seconds that the server adds to each call, during which the instance is taken.
        outside: seconds that client and server add to each request, during which no instance is taken: the median.
        spread: seconds by which what they add differs from that, float64 [n]; each request draws one.
        race: the chance that the batcher is awake before the instance whose end of a call has woken it.
        handover: seconds that an instance stands idle before each call where no batch may be formed ahead.
    """

    calls: Mapping[int, Seconds]
    together: tuple[float, ...] = (1.0,)
    inside: float = 0.0
    outside: float = 0.0
    race: float = 0.3
    handover: float = 0.0
    spread: Seconds = field(default_factory=lambda: np.zeros(1))

    def beside(self, count: int, generator: np.random.Generator) -> Seconds:
        """Return the seconds that client and server add to so many requests, float64 [n], none below 0."""
        drawn = self.spread[generator.integers(len(self.spread), size=count)]
        return np.maximum(0.0, self.outside + drawn)

    def sampler(self, generator: np.random.Generator) -> Callable[[int, int], float]:
        """Return a function from (batch size, instances running, this one included) to the seconds of one call.

        The n-th call draws a share, and takes the time that so many of its size's measured times are below: with equal
        generators configurations have the same luck (common random numbers). Between two measured sizes the times of
        both at that share are weighed; above the largest, its times grow in proportion.
        """
        tables: dict[int, list[float]] = {}
        draw = _shares(generator).__next__
        together, inside = self.together, self.inside
        most = len(together)

        def seconds(batch: int, running: int) -> float:
            times = tables.get(batch)
            if times is None:
                times = tables[batch] = self._times(batch).tolist()
            return times[int(draw() * len(times))] * together[(running if running < most else most) - 1] + inside

        return seconds

    def _times(self, batch: int) -> Seconds:
        """Return times of a call with so many samples, ascending."""
        sizes = sorted(self.calls)
        above = next((size for size in sizes if size >= batch), None)
        if above is None:
            return np.sort(self.calls[sizes[-1]]) * (batch / sizes[-1])
        below = max((size for size in sizes if size <= batch), default=above)
        if above == below:
            return np.sort(self.calls[above])
        share = (batch - below) / (above - below)
        low, high = self.calls[below], self.calls[above]
        count = max(len(low), len(high))
        at = (np.arange(count) + 0.5) / count
        return _at(low, at) * (1 - share) + _at(high, at) * share


def _at(times: Seconds, shares: Seconds) -> Seconds:
    """Return the measured time that each share of the times is below."""
    return np.sort(times)[(shares * len(times)).astype(np.intp)]


def _shares(generator: np.random.Generator) -> Iterator[float]:
    """Yield numbers from 0 to below 1."""
    while True:
        yield from generator.random(_BLOCK).tolist()
