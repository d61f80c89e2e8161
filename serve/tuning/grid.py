"""Grid: every configuration, simulated with the same arrivals and the same luck, and put in order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from loadtest.record import statistics
from serve.planning.engines.calls import capacity
from serve.planning.objective import Judged, Objective
from serve.simulate.arrivals import Arrivals
from serve.simulate.configuration import Configuration
from serve.simulate.result import ANSWERED, Simulated
from serve.simulate.service import Seconds
from serve.simulate.simulation import simulate
from serve.tuning.known import HALF, Known, Tried, pressing, queued
from serve.tuning.live import Traffic
from serve.tuning.measure import sizes

Goal = Literal["throughput", "latency", "cores"]
GOALS: tuple[Goal, ...] = ("throughput", "latency", "cores")
DELAYS = (0.0, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005)
LONG, LONGEST = 20, 8.0
"""A simulation lasts so many times the objective's time, so that a rate a little too high shows; its most seconds."""
EVERY = 20
"""Configurations between two words of progress."""
FAR = 4.0
"""Requests that never meet another are so many times the longest call apart."""
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
        known: what was measured.
        today: the present configuration; what is not turned stays as in it.
        largest: the largest batch of the model; 0 where the server forms none.
        traffic: when requests come.
        objective: what must hold.
    """

    known: Known
    today: Configuration
    largest: int
    traffic: Traffic
    objective: Objective

    def configurations(self) -> Iterator[Configuration]:
        """Yield threads × instances × largest batches × delays."""
        limits = [size for size in sizes(self.largest) if size >= max(self.today.preferred, default=1)]
        delays = DELAYS if self.largest else (0.0,)
        for threads, curve in sorted(self.known.curves.items()):
            instances = range(1, len(curve.together) + 1)
            for count, limit, delay in product(instances, limits, delays):
                if limit > 1 or not delay:
                    threaded = replace(self.today, dynamic=self.largest > 0, threads=threads)
                    yield replace(threaded, instances=count, max_batch=limit, delay=delay)

    def outcome(self, configuration: Configuration, rate: float, seconds: float | None = None) -> Outcome:
        """Simulate one configuration at a rate, for as long as it takes to tell unless the seconds are given."""
        if seconds is None:
            seconds = max(REQUESTS / rate, self.objective.requests / rate, min(LONGEST, LONG * self.objective.longest))
        return self._judged(configuration, rate, self._simulated(configuration, rate, seconds))

    def spent(self, configuration: Configuration, rate: float, seconds: float) -> dict[str, float]:
        """Return the milliseconds of a request, on average, by where it spends them; at an open loop's rate."""
        waited, made = self._simulated(configuration, rate, seconds)
        done, inside = made.answered, self.known.curve(configuration.threads).inside
        queue = (done["start"] - done["arrival"]).mean()
        call = (done["end"] - done["start"]).mean() - inside
        outside = done["outside"].mean() + waited[made.requests["outcome"] == ANSWERED].mean()
        return {"queue": queue * 1e3, "call": call * 1e3, "inside": inside * 1e3, "outside": outside * 1e3}

    def _simulated(self, configuration: Configuration, rate: float, seconds: float) -> tuple[Seconds, Simulated]:
        """Return how long each request waits for a core to be received, float64 [n], and what becomes of it then."""
        at = np.asarray(self.traffic.at(rate).simulated(seconds).at, np.float64)
        received = queued(at, 1 / self.known.ceiling(configuration))
        made = simulate(Arrivals(received), self.known.curve(configuration.threads), configuration)
        return received - at, made

    def _judged(self, configuration: Configuration, rate: float, simulated: tuple[Seconds, Simulated]) -> Outcome:
        waited, made = simulated
        answered = made.requests["outcome"] == ANSWERED
        latencies = np.full(len(made.requests), np.inf)
        latencies[answered] = made.latencies + waited[answered]
        figures = statistics.milliseconds(latencies)
        judged = self.objective.judge(figures, len(latencies), int((~answered).sum()))
        cores = made.busy * configuration.instances * configuration.threads
        return Outcome(configuration, rate, figures, tuple(judged), cores)

    def most(self, configuration: Configuration) -> float:
        """Return the requests per second that neither its instances nor the cores let pass."""
        return min(capacity(self.known.curve(configuration.threads), configuration), self.known.ceiling(configuration))

    def alone(self) -> Outcome:
        """Return the least latency of requests that never meet another."""
        found = []
        for threads, curve in self.known.curves.items():
            configuration = replace(self.today, threads=threads, delay=0.0)
            apart = FAR * float(max(times.max() for times in curve.calls.values()))
            at = np.arange(max(REQUESTS, self.objective.requests)) * apart
            made = simulate(Arrivals(at), curve, configuration)
            found.append(self._judged(configuration, 1 / apart, (np.zeros(len(at)), made)))
        return min(found, key=lambda one: one.latency_ms[percentile(self.objective)])

    def highest(self, configuration: Configuration, above: float = 0.0) -> Outcome | None:
        """Return the outcome at the highest rate that a configuration holds; None where it is not above a rate."""
        high = self.most(configuration)
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

    def refitted(self, tried: Sequence[Tried]) -> "Space":
        """Return the same with what live runs say: of server and client, and near the highest rate, of the cores."""
        known = replace(self.known, live=tuple(tried)).fitted()
        space = replace(self, known=known)
        pressed = [one for one in tried if one.seen.rate >= HALF * known.ceiling(one.configuration)]
        if not pressed:
            return space
        takes = float(np.mean([space.taken(one) for one in pressed]))
        return replace(self, known=replace(known, request=takes))

    def taken(self, one: Tried) -> float:
        """Return the seconds of a core that a request takes with which a live run is as late as it was seen."""
        name = percentile(self.objective)
        wanted = statistics.milliseconds(one.seen.latencies)[name]

        def late(request: float) -> float:
            space = replace(self, known=replace(self.known, request=request))
            return space.outcome(one.configuration, one.traffic.rate, one.seconds).latency_ms[name]

        return pressing(0.0, 2 * self.known.cores / one.seen.rate, late, wanted)


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
    if not found:
        found = [space.outcome(one, space.most(one) / 2**HALVINGS) for one in asked]
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
