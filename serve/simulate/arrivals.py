"""Arrivals: when requests come and what each is like, as a load generator sends them or as a recording has them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from loadtest.plan import schedule
from loadtest.plan.data import trace


@dataclass(frozen=True)
class Kinds:
    """What requests are like, an array [n] each, in the order in which they are sent; None is alike for all.

    Args:
        items: samples of a request, ≥ 1; None is 1.
        level: its priority level, counted from 0, the most urgent; None is the last.
        timeout: seconds after which it may expire by its own wish; 0 has no wish.
        shape: a number that requests share whose inputs have the same shapes; only free dims look at it.
    """

    items: ArrayLike | None = None
    level: ArrayLike | None = None
    timeout: ArrayLike | None = None
    shape: ArrayLike | None = None

    def column(self, name: str, count: int, default: float) -> list[float]:
        """Return one of the arrays as a list of `count` values.

        Raises:
            ValueError: it has another length.
        """
        values = getattr(self, name)
        if values is None:
            return [default] * count
        found: list[float] = np.asarray(values).tolist()
        if len(found) != count:
            raise ValueError(f"{name} has {len(found)} values for {count} requests")
        return found


@dataclass(frozen=True)
class Arrivals:
    """An open loop: requests come at times of their own, whatever the server does.

    Args:
        at: seconds, float64 [n], ascending.
        kinds: what they are like.
    """

    at: ArrayLike
    kinds: Kinds = field(default_factory=Kinds)

    def times(self) -> list[float]:
        """Return the times at which requests come that wait for no answer.

        Raises:
            ValueError: they are not in order.
        """
        at = np.asarray(self.at, np.float64)
        if (np.diff(at) < 0).any():
            raise ValueError("arrivals must be in order of time")
        found: list[float] = at.tolist()
        return found

    def __len__(self) -> int:
        return np.asarray(self.at).size


@dataclass(frozen=True)
class Clients:
    """A closed loop: each client sends its next request when it has its answer.

    Args:
        count: clients, ≥ 1.
        requests: how many requests they send in all.
        think: seconds between an answer and the client's next request.
        kinds: what the requests are like.
    """

    count: int
    requests: int
    think: float = 0.0
    kinds: Kinds = field(default_factory=Kinds)

    def times(self) -> list[float]:
        """Return the times at which requests come that wait for no answer: each client's first."""
        return [0.0] * min(self.count, self.requests)

    def __len__(self) -> int:
        return self.requests


def scheduled(rate: float, duration: float, seed: int = 0, arrival: str = "poisson", profile: str = "flat") -> Arrivals:
    """Return the arrivals that the load generator makes of the same words.

    Args:
        rate: requests per second.
        duration: seconds.
        seed: of the arrivals.
        arrival: a name in `loadtest.plan.schedule.ARRIVALS`, with its settings as in `gamma:burstiness=0.5`.
        profile: a name in its `PROFILES`, likewise.

    Raises:
        UsageError: no such name or setting, or a rate without sense.
    """
    return Arrivals(np.fromiter(schedule.times(rate, duration, seed, arrival, profile), np.float64))


def recorded(path: Path, speed: float = 1.0) -> Arrivals:
    """Return the arrivals of a trace: a file of send times, or recorded traffic that ends with .jsonl.

    Args:
        path: the file.
        speed: 2 replays in half the time.

    Raises:
        BadInput: no such file, no times in it, or a line that is none.
    """
    times: Sequence[float] = trace.read(path, speed)
    return Arrivals(np.asarray(times, np.float64))
