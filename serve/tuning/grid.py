"""Grid: every configuration, simulated with the same arrivals and the same luck, and put in order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from loadtest.record import statistics
from serve.planning.engines.calls import capacity
from serve.planning.objective import Judged, Objective
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate
from serve.tuning.live import Traffic
from serve.tuning.measure import sizes

Goal = Literal["throughput", "latency", "cores"]
GOALS: tuple[Goal, ...] = ("throughput", "latency", "cores")
DELAYS = (0.0, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005)
LONG, LONGEST = 20, 8.0
"""A simulation lasts so many times the objective's time, so that a rate a little too high shows; its most seconds."""
EVERY = 20
"""Configurations between two words of progress."""
REQUESTS, HALVINGS, SLACK = 4000, 5, 1.02
"""Requests of a simulation at the least, halvings of a rate, and how much higher a rate must be to be looked for."""


@dataclass(frozen=True)
class Outcome:
    """What the simulation says of one configuration.

    Args:
        configuration: that one.
        rate: requests per second that came.
        latency_ms: as `loadtest.record.statistics.milliseconds` returns it.
        judged: what each condition says.
        busy: the cores that the instances keep busy on average.
    """

    configuration: Configuration
    rate: float
    latency_ms: dict[str, float]
    judged: tuple[Judged, ...]
    busy: float

    @property
    def holds(self) -> bool:
        """Whether every condition holds."""
        return all(one.passed for one in self.judged)

    @property
    def excess(self) -> float:
        """How many times its limit the figure of the worst condition is."""
        return max((one.excess for one in self.judged), default=0.0)

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        configuration = self.configuration
        return {
            **knobs(configuration),
            "rate": self.rate,
            "latency_ms": self.latency_ms,
            "holds": self.holds,
            "busy_cores": self.busy,
        }


def knobs(configuration: Configuration) -> dict[str, Any]:
    """Return what is turned, as documents name it."""
    return {
        "threads": configuration.threads,
        "instances": configuration.instances,
        "max_batch": configuration.max_batch,
        "delay_us": round(configuration.delay * 1e6),
    }


@dataclass(frozen=True)
class Space:
    """What is looked for and where.

    Args:
        curves: the times of a call by number of threads.
        today: the present configuration; what is not turned stays as in it.
        largest: the largest batch of the model; 0 where the server forms none.
        traffic: when requests come.
        objective: what must hold.
    """

    curves: Mapping[int, Curve]
    today: Configuration
    largest: int
    traffic: Traffic
    objective: Objective

    def configurations(self) -> Iterator[Configuration]:
        """Yield threads × instances × largest batches × delays."""
        limits = [size for size in sizes(self.largest) if size >= max(self.today.preferred, default=1)]
        delays = DELAYS if self.largest else (0.0,)
        for threads, curve in sorted(self.curves.items()):
            instances = range(1, len(curve.together) + 1)
            for count, limit, delay in product(instances, limits, delays):
                if limit > 1 or not delay:
                    threaded = replace(self.today, dynamic=self.largest > 0, threads=threads)
                    yield replace(threaded, instances=count, max_batch=limit, delay=delay)

    def outcome(self, configuration: Configuration, rate: float) -> Outcome:
        """Simulate one configuration at a rate."""
        traffic = self.traffic.at(rate)
        seconds = max(REQUESTS / rate, self.objective.requests / rate, min(LONGEST, LONG * self.objective.longest))
        made = simulate(traffic.simulated(seconds), self._curve(configuration), configuration)
        lost = len(made.requests) - len(made.latencies)
        figures = statistics.milliseconds(np.append(made.latencies, np.full(lost, np.inf)))
        judged = self.objective.judge(figures, len(made.requests), lost)
        cores = made.busy * configuration.instances * configuration.threads
        return Outcome(configuration, rate, figures, tuple(judged), cores)

    def _curve(self, configuration: Configuration) -> Curve:
        """Return the times of its number of threads, or of the nearest that was measured."""
        return self.curves[min(self.curves, key=lambda threads: abs(threads - configuration.threads))]

    def highest(self, configuration: Configuration, above: float = 0.0) -> Outcome | None:
        """Return the outcome at the highest rate that a configuration holds; None where it is not above a rate."""
        high = capacity(self._curve(configuration), configuration)
        low = above * SLACK if above else high / 2**HALVINGS
        if low >= high:
            return None
        best = self.outcome(configuration, low)
        if not best.holds:
            return None
        for _ in range(HALVINGS):
            tried = self.outcome(configuration, (low + high) / 2)
            if tried.holds:
                best, low = tried, tried.rate
            else:
                high = tried.rate
        return best


def percentile(objective: Objective) -> str:
    """Return the figure of latency that the objective speaks of first; p99 where it speaks of none."""
    return next((one.metric.key for one in objective.conditions if one.metric.kind == "time"), "p99")


def ranked(space: Space, goal: Goal, tell: Callable[[str, float], None]) -> list[Outcome]:
    """Return outcomes, the best first; for `throughput` only those that were the best so far when they were tried.

    Where none holds, the nearest misses come first.
    """
    asked = list(space.configurations())
    found: list[Outcome] = []
    best, name = 0.0, percentile(space.objective)
    for place, configuration in enumerate(asked):
        if place % EVERY == 0:
            tell(f"simulating: {len(asked)} configurations{_best(found, goal, name)}", place / len(asked))
        if goal != "throughput":
            found.append(space.outcome(configuration, space.traffic.rate))
        elif outcome := space.highest(configuration, best):
            best = outcome.rate
            found.append(outcome)
    return sorted(found, key=lambda one: order(one, goal, name))


def order(outcome: Outcome, goal: Goal, name: str) -> tuple[float, ...]:
    """Return what outcomes are put in order by, the smallest first."""
    if not outcome.holds:
        return (1.0, outcome.excess)
    late, taken = outcome.latency_ms[name], outcome.configuration.threads * outcome.configuration.instances
    by: dict[Goal, tuple[float, ...]] = {
        "throughput": (0.0, -outcome.rate),
        "latency": (0.0, late),
        "cores": (0.0, taken, outcome.busy, late),
    }
    return by[goal]


def _best(found: list[Outcome], goal: Goal, name: str) -> str:
    if not found:
        return ""
    best = min(found, key=lambda one: order(one, goal, name))
    return f", best so far {best.latency_ms[name]:.3g} ms at {best.rate:,.0f}/s"
