"""Balancers: which replica a request goes to, where that does not depend on how busy they are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.plan.calls import Whole

Pick = Callable[[int, int], Whole]
"""From (requests, requests so far) to the replica of each, int64 [requests]."""
BALANCERS = ("random", "round-robin", "least-loaded", "pinned")


@dataclass(frozen=True)
class Balancer:
    """What stands before the replicas.

    Args:
        name: of `BALANCERS`.
        clients: of a `pinned` one: how many clients keep one connection each, to a replica drawn at random. Their rates
            differ as exponential numbers do.
    """

    name: str = "random"
    clients: int = 1000

    def pick(self, replicas: int, clients: float, generator: np.random.Generator) -> tuple[Pick, float]:
        """Return how requests are sent to `replicas`, and the share of them that the busiest replica gets.

        Args:
            replicas: how many, ≥ 1.
            clients: that send to these; a part of a larger fleet has its part of the clients.
            generator: of all that is drawn.
        """
        even = 1 / replicas
        if self.name == "round-robin":
            first = int(generator.integers(replicas))
            return lambda count, done: (first + done + np.arange(count)) % replicas, even
        if self.name != "pinned":
            return lambda count, _done: generator.integers(replicas, size=count), even
        number = max(1, round(clients))
        rates = np.bincount(
            generator.integers(replicas, size=number), generator.standard_exponential(number), minlength=replicas
        )
        upto = np.cumsum(rates) / rates.sum()
        return lambda count, _done: _below(upto, generator.random(count)), float(rates.max() / rates.sum())


def _below(upto: npt.NDArray[np.float64], drawn: npt.NDArray[np.float64]) -> Whole:
    return np.minimum(np.searchsorted(upto, drawn, side="right"), len(upto) - 1)
