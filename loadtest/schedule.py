"""Schedule: when each request of an open-loop run is due.

One function per load shape. Each is pure: from rate, duration and seed come send times in seconds after the start of
the run, ascending and below `duration`. No clock is read here. A new shape is a new function and a row in `SHAPES`.
"""

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

Shape = Callable[[float, float, int], Iterator[float]]
_BLOCK = 1024

FASTEST = 100_000.0
"""Requests a second that may be asked for; beyond what one generator sends, a run would be a list of dropped ones."""
MOST_IN_FLIGHT = 1000
"""Requests in flight at once, at most."""


def constant(rate: float, duration: float, seed: int = 0) -> Iterator[float]:
    """Yield equally spaced send times, `rate` per second, the first at 0."""
    for n in count():
        # A product, not a sum: rounding must not add up over a long run.
        at = n / rate
        if at >= duration:
            return
        yield at


def poisson(rate: float, duration: float, seed: int = 0) -> Iterator[float]:
    """Yield the arrivals of many independent users, `rate` per second on average: exponential gaps."""
    rng = np.random.default_rng(seed)
    last = 0.0
    while True:
        for at in (last + np.cumsum(rng.exponential(1 / rate, _BLOCK))).tolist():
            if at >= duration:
                return
            last = at
            yield at


SHAPES: dict[str, Shape] = {"constant": constant, "poisson": poisson}
