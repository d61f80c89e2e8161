"""Balancers: which replica a request goes to, where that does not depend on how busy they are."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from serve.planning.engines.calls import Whole

Pick = Callable[[int, int], Whole]
"""From (requests, requests so far) to the replica of each, int64 [requests]."""


@dataclass(frozen=True)
class Balancer:
    """What stands before the replicas.

    Args:
        name: of `serve.planning.BALANCERS`.
        clients: of a `pinned` one: how many clients keep one connection each, to a replica drawn at random. Their rates
            differ as exponential numbers do.
    """

    name: str = "random"
    clients: int = 1000

    def pick(self, cell: int, replicas: int, generator: np.random.Generator) -> tuple[Pick, float]:
        """Return how requests are sent to a cell of a fleet, and what the fleet's busiest replica gets.

        Args:
            cell: replicas of the cell, ≥ 1.
            replicas: of the fleet, at least as many.
            generator: of all that is drawn.

        Returns:
            The function, and the busiest replica's rate as a share of the cell's.
        """
        if self.name == "round-robin":
            first = int(generator.integers(cell))
            return lambda count, done: (first + done + np.arange(count)) % cell, 1 / cell
        if self.name != "pinned":
            return lambda count, _done: generator.integers(cell, size=count), 1 / cell
        rates = np.bincount(
            generator.integers(replicas, size=self.clients),
            generator.standard_exponential(self.clients),
            minlength=replicas,
        )
        busiest = float(rates.max() / rates.sum()) * replicas / cell
        # Replicas at even distances in their order stand for all.
        part = np.sort(rates)[np.linspace(0, replicas - 1, cell).astype(np.int64)] if replicas > cell else rates
        upto = np.cumsum(part) / part.sum()
        return lambda count, _done: _below(upto, generator.random(count)), busiest


def _below(upto: npt.NDArray[np.float64], drawn: npt.NDArray[np.float64]) -> Whole:
    return np.minimum(np.searchsorted(upto, drawn, side="right"), len(upto) - 1)
