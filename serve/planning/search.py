"""Search: the smallest fleet that holds an objective at a rate, and the highest rate that a fleet holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from loadtest.record import statistics
from modelathe.errors import Refused
from serve.planning.engines.calls import Calls
from serve.planning.fleet import Fleet, Outcome, simulate
from serve.planning.objective import Judged

MOST = 100_000
"""Replicas that are tried at the most, unless told otherwise."""
NEIGHBOURS = 2
"""How many numbers above the smallest that holds must hold too."""
PRECISION = 0.01
"""Half the width of the interval in which the highest rate lies, as a share."""
MISSES = 3
"""How many numbers that do not hold are told."""

Tell = Callable[[Outcome], None]


@dataclass
class Search:
    """What was simulated of one fleet so far, so that nothing is simulated twice.

    Args:
        fleet: what is planned for.
        rate: requests per second.
        most: replicas that are tried at the most.
        tell: called with each outcome.
    """

    fleet: Fleet
    rate: float
    most: int = MOST
    tell: Tell = lambda _outcome: None
    tried: dict[int, Outcome] = field(default_factory=dict)

    def at(self, replicas: int) -> Outcome:
        """Return what so many replicas do at the rate."""
        if replicas not in self.tried:
            self.tried[replicas] = simulate(self.fleet, replicas, self.rate)
            self.tell(self.tried[replicas])
        return self.tried[replicas]

    def smallest(self, above: int = 0) -> int:
        """Return the smallest number of replicas that holds, and two above it too.

        Args:
            above: a number that is known not to hold.

        Raises:
            Refused: a request that finds its replica idle is too late already, or no number holds.
        """
        check_alone(self.fleet)
        # So many are taken all the time: their queues only grow.
        low = max(above, int(min(self.rate / self.fleet.capacity, self.most)))
        found = self._between(*self._around(low))
        while (worse := self._worse(found)) is not None:
            found = next((n for n in range(worse + 1, self.most + 1) if self.at(n).holds), 0)
            if not found:
                raise self._refusal()
        return found

    def _around(self, low: int) -> tuple[int, int]:
        """Return a number that does not hold and a larger one that does."""
        gap = max(1, low // 8)
        while True:
            high = min(low + gap, self.most)
            if high <= low:
                raise self._refusal()
            if self.at(high).holds:
                return low, high
            low, gap = high, 2 * gap

    def _between(self, low: int, high: int) -> int:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle).holds else (middle, high)
        return high

    def _worse(self, found: int) -> int | None:
        """Return a number just above that does not hold, as chance has it where the objective is hardly held."""
        above = range(found + 1, min(found + NEIGHBOURS, self.most) + 1)
        return next((number for number in above if not self.at(number).holds), None)

    def nearest(self) -> list[Outcome]:
        """Return those that do not hold, the nearest first."""
        missed = [outcome for outcome in self.tried.values() if not outcome.holds]
        return sorted(missed, key=lambda outcome: outcome.binding.excess)[:MISSES]

    def _refusal(self) -> Refused:
        misses = self.nearest()
        told = "; ".join(f"{one.replicas:,} replicas: {_broken(one)}" for one in misses) or "none can answer so many"
        pinned = self.fleet.balancer.name == "pinned"
        failure = Refused(
            f"no number of replicas up to {self.most:,} holds {self.fleet.objective.text} at {self.rate:,.10g}/s:"
            f" {told}",
            fix="a client's connection is never split: let clients open more, or balance by request"
            if pinned
            else "allow more time, or make a call faster; --most raises the number that is tried",
        )
        failure.partial = {"nearest": [one.document() for one in misses]}
        return failure


def check_alone(fleet: Fleet) -> None:
    """Refuse an objective that not even a request alone on its replica holds.

    Raises:
        Refused: with the lowest times that can be reached.
    """
    judged = alone(fleet)
    broken = [one for one in judged if not one.passed]
    if not broken:
        return
    lowest = ", ".join(f"{one.text.split()[0]} {number(one)}" for one in broken)
    failure = Refused(
        f"no number of replicas holds {', '.join(one.text for one in broken)}:"
        f" a request that finds its replica idle has {lowest}",
        fix="that is the lowest which can be reached: ask for more, or make a call faster",
    )
    failure.partial = {"lowest": {one.text: one.measured for one in broken}}
    raise failure


def alone(fleet: Fleet) -> list[Judged]:
    """Return what the conditions say of requests that each find their replica idle."""
    ones, generator = np.ones(100_000, np.int64), np.random.default_rng(fleet.seed)
    took = Calls(fleet.curve, 1, generator).draw(ones, ones) + fleet.curve.beside(len(ones), generator)
    return fleet.objective.judge(statistics.milliseconds(took), len(took))


def highest(fleet: Fleet, replicas: int, rate: float, tell: Tell = lambda _outcome: None) -> float:
    """Return the rate up to which so many replicas hold the objective, to 1 %.

    Args:
        fleet: what is planned for.
        replicas: how many.
        rate: one that they hold.
        tell: called with each outcome.
    """
    low, high = rate, max(replicas * fleet.capacity, rate)
    while high > low * (1 + 2 * PRECISION):
        middle = (low * high) ** 0.5
        outcome = simulate(fleet, replicas, middle)
        tell(outcome)
        low, high = (middle, high) if outcome.holds else (low, middle)
    return low


def number(judged: Judged) -> str:
    """Return the figure of a condition with its unit."""
    if judged.measured == float("inf"):
        return "queues that only grow"
    return f"{judged.measured:.3g}{'' if judged.unit == '%' else ' '}{judged.unit}"


def _broken(outcome: Outcome) -> str:
    return f"{outcome.binding.text} is {number(outcome.binding)}"
