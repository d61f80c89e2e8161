"""How long a call takes: measured times by batch size, resampled.

A mean gives a p99 that is too low; that is why each simulated call takes a time that was measured.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The times of a model's calls on one machine, with a number of threads.

    Args:
        calls: seconds of each measured call, float64 [n], by batch size; n ≥ 1, sizes ≥ 1.
        together: how many times longer a call takes while 1, 2, … instances run; the last counts for more of them.
        inside: seconds that the server adds to each call, during which the instance is taken.
        outside: seconds that client and server add to each request, during which no instance is taken.
    """

    calls: Mapping[int, Seconds]
    together: tuple[float, ...] = (1.0,)
    inside: float = 0.0
    outside: float = 0.0

    def sampler(self, generator: np.random.Generator) -> Callable[[int, int], float]:
        """Return a function from (batch size, instances running, this one included) to the seconds of one call.

        Between two measured sizes both are drawn and weighed; above the largest, its times grow in proportion.
        """
        sizes = sorted(self.calls)

        def draw(size: int) -> float:
            times = self.calls[size]
            return float(times[generator.integers(len(times))])

        def seconds(batch: int, running: int) -> float:
            above = next((size for size in sizes if size >= batch), None)
            below = max((size for size in sizes if size <= batch), default=sizes[0])
            if above is None:
                call = draw(below) * batch / below
            elif above <= below or batch < sizes[0]:
                call = draw(above)
            else:
                share = (batch - below) / (above - below)
                call = draw(below) * (1 - share) + draw(above) * share
            slower = self.together[min(running, len(self.together)) - 1]
            return call * slower + self.inside

        return seconds
