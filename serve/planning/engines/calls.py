"""Calls: many times of a call at once, drawn as `Curve.sampler` draws one."""

import numpy as np
import numpy.typing as npt

from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve, Seconds

Whole = npt.NDArray[np.int64]


class Calls:
    """The times of a model's calls, ready to be drawn by the thousand.

    Args:
        curve: the measured times.
        largest: the largest batch that will be asked for, ≥ 1.
        generator: what they are drawn with.
    """

    def __init__(self, curve: Curve, largest: int, generator: np.random.Generator) -> None:
        self.inside, self.together, self._generator = curve.inside, np.array(curve.together), generator
        sizes = np.array(sorted(curve.calls))
        counts = np.array([len(curve.calls[size]) for size in sizes])
        self._times = np.concatenate([np.sort(curve.calls[size]) for size in sizes])
        batches = np.arange(largest + 1)
        above = np.minimum(np.searchsorted(sizes, batches), len(sizes) - 1)
        below = np.maximum(np.searchsorted(sizes, batches, side="right") - 1, 0)
        between = sizes[above] > sizes[below]
        self._share = np.where(between, (batches - sizes[below]) / np.where(between, sizes[above] - sizes[below], 1), 0)
        self._scale = np.maximum(batches / sizes[-1], 1.0)
        begins = np.cumsum(counts) - counts
        self._low, self._high = (begins[below], counts[below]), (begins[above], counts[above])
        self._finest = np.maximum(counts[below], counts[above])

    def alone(self, batch: Whole) -> Seconds:
        """Return the seconds of a call for each batch size, float64 [n], while no other instance runs."""
        finest = self._finest[batch]
        # Of two measured sizes, the times that equally many are below.
        luck = (np.floor(self._generator.random(len(batch)) * finest) + 0.5) / finest
        found = self._at(self._low, batch, luck)
        share = self._share[batch]
        if len(mixed := np.flatnonzero(share)):
            found[mixed] += share[mixed] * (self._at(self._high, batch[mixed], luck[mixed]) - found[mixed])
        found *= self._scale[batch]
        return found

    def draw(self, batch: Whole, running: Whole) -> Seconds:
        """Return the seconds that an instance is taken for each batch, float64 [n].

        Args:
            batch: sizes, int64 [n].
            running: instances that run, each one's own included, int64 [n].
        """
        found = self.alone(batch)
        found *= self.together[np.minimum(running, len(self.together)) - 1]
        found += self.inside
        return found

    def _at(self, where: tuple[Whole, Whole], batch: Whole, luck: Seconds) -> Seconds:
        begin, count = where[0][batch], where[1][batch]
        found: Seconds = self._times[begin + (luck * count).astype(np.int64)]
        return found


def largest_batch(configuration: Configuration) -> int:
    """Return the most requests of one sample that a call gets: 1 where the server forms no batches."""
    return configuration.max_batch if configuration.dynamic else 1


def capacity(curve: Curve, configuration: Configuration) -> float:
    """Return the requests per second that one replica answers at the most, each of one sample."""
    sizes = np.arange(1, largest_batch(configuration) + 1)
    measured = sorted(curve.calls)
    mean = np.interp(sizes, measured, [curve.calls[size].mean() for size in measured])
    mean *= np.maximum(sizes / measured[-1], 1.0)
    # Near that rate all instances run.
    slower = curve.together[min(configuration.instances, len(curve.together)) - 1]
    return float((configuration.instances * sizes / (mean * slower + curve.inside)).max())
