"""Fleet: replicas behind a balancer at one rate, simulated and judged.

A small fleet is simulated several times side by side, each time with arrivals of its own. Of a large one a cell is
simulated, with its share of the requests and of the clients: behind a balancer that looks at the load, a cell is never
better than the whole; behind the others its replicas are as those of the whole. A trace is never cut into cells, but
where each request is looked at by itself.

Without a delay and without limits of the queue, thousands of replicas are simulated at once (`lanes`); with them one
after the other, as Triton's scheduler does it (`exact`). A balancer that looks at the load has a loop of its own.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loadtest.record import statistics
from serve.planning import intervals
from serve.planning.arrivals import Arrivals
from serve.planning.engines.balancers import Balancer, Pick
from serve.planning.engines.calls import Calls, Whole, capacity, largest_batch
from serve.planning.engines.exact import Replicas
from serve.planning.engines.lanes import Lanes, blocks
from serve.planning.engines.leastloaded import Loop
from serve.planning.intervals import Interval, Slices
from serve.planning.objective import Judged, Objective
from serve.planning.served import plain
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve, Seconds

LANES = 256
"""Replicas, copies of small fleets counted, that are simulated at the least if the requests are enough."""
CELL, LOADED_CELL = 1000, 200
"""Replicas that are simulated at the most, and where each request is looked at by itself."""
EACH = 400
"""Requests for each simulated replica, at the least."""
SPAN, LONGER = 100, 4
"""How many times the longest limit each simulation lasts, so that queues near it have time to grow; but no more than so
many times the requests that were asked for.
"""
LOADED = 200_000
"""Requests that are simulated at the most where each is looked at by itself."""
WARM = 0.1
"""Share of the requests that come first and do not count: a simulation begins with empty queues."""
BLOCK = 2_000_000
"""Requests that are held at a time."""


@dataclass(frozen=True)
class Fleet:
    """What is planned for.

    Args:
        curve: the times of a call.
        configuration: of the model; a balancer that looks at the load is simulated without its delay, preferred sizes
            and queue limits.
        objective: what must hold.
        arrivals: how requests follow each other.
        balancer: what stands before the replicas.
        requests: to simulate, at the least.
        seed: equal seeds give equal figures.
        cell: replicas that are simulated at the most; 0 is all of them.
    """

    curve: Curve
    configuration: Configuration
    objective: Objective
    arrivals: Arrivals
    balancer: Balancer = field(default_factory=Balancer)
    requests: int = 1_000_000
    seed: int = 0
    cell: int = CELL

    @property
    def capacity(self) -> float:
        """Return the requests per second that one replica answers at the most."""
        return capacity(self.curve, self.configuration)

    @property
    def one_by_one(self) -> bool:
        """Return whether each request is looked at by itself, which is slow."""
        return self.balancer.name == "least-loaded" or not plain(self.configuration)


@dataclass(frozen=True)
class Outcome:
    """What a fleet of so many replicas does at a rate.

    Args:
        replicas: how many.
        rate: requests per second, of all.
        requests: how many were simulated and count.
        latency_ms: as `loadtest.record.statistics.milliseconds`; infinite where the queues only grow.
        busiest: requests per second of the busiest replica.
        load: the rate over what so many replicas answer at the most, in full batches.
        utilization: share of the time in which an instance is taken; 1 where the queues only grow.
        batch: mean size of a batch; NaN where the queues only grow.
        judged: what each condition says.
        interval_ms: the 95 % interval of each figure in `latency_ms` that there are requests enough for.
        inside: requests inside a replica on average, by Little's law; NaN where the queues only grow.
    """

    replicas: int
    rate: float
    requests: int
    latency_ms: dict[str, float]
    busiest: float
    load: float
    utilization: float
    batch: float
    judged: tuple[Judged, ...]
    interval_ms: dict[str, Interval] = field(default_factory=dict)
    inside: float = float("nan")

    @property
    def holds(self) -> bool:
        """Return whether every condition does."""
        return all(one.passed for one in self.judged)

    @property
    def binding(self) -> Judged:
        """Return the condition that is nearest to its limit, or furthest beyond it."""
        return max(self.judged, key=lambda one: one.excess)

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        values = {
            key: getattr(self, key)
            for key in ("replicas", "rate", "requests", "busiest", "load", "utilization", "batch")
        }
        each = self.rate / self.replicas if self.replicas else float("inf")
        return {
            **values,
            "per_replica": each,
            "latency_ms": self.latency_ms,
            "interval_ms": {key: list(interval) for key, interval in self.interval_ms.items()},
            "holds": self.holds,
            "conditions": [one.document() for one in self.judged],
        }


@dataclass
class _Run:
    """One simulation: its clusters side by side, and what each of them is sent."""

    fleet: Fleet
    replicas: int
    rate: float
    thinned: float
    clusters: int
    generator: np.random.Generator
    picks: list[tuple[Pick, float]]

    def gaps(self, count: int, done: int) -> Seconds:
        """Return the seconds between the next requests of a cluster."""
        return self.fleet.arrivals.gaps(count, done, self.generator, self.thinned) / self.rate

    @property
    def count(self) -> int:
        """Return the requests of each cluster."""
        lasting = min(_span(self.fleet, self.rate), LONGER * self.fleet.requests) * self.clusters
        wanted = max(self.fleet.requests, EACH * self.clusters * self.replicas, int(lasting))
        if self.fleet.one_by_one:
            wanted = min(wanted, LOADED)
        return max(-(-wanted // self.clusters), self.fleet.objective.requests)


def simulate(fleet: Fleet, replicas: int, rate: float) -> Outcome:
    """Return what `replicas` do at a rate of all requests per second; none of them hold nothing."""
    if replicas <= 0:
        return _growing(fleet, replicas, rate, float("inf"))
    run = _prepared(fleet, replicas, rate)
    busiest = max(share for _, share in run.picks) * run.rate
    if busiest >= fleet.capacity:
        return _growing(fleet, replicas, rate, busiest)
    done = _one_by_one(run) if fleet.one_by_one else _in_lanes(run)
    latency_ms = statistics.milliseconds(done.latencies)
    between = intervals.of(done.latencies, done.slices, latency_ms)
    failed = ~np.isfinite(done.latencies)
    judged = fleet.objective.judge(latency_ms, len(failed), float(failed.sum()))
    bounds = [
        fleet.objective.judge({key: interval[end] for key, interval in between.items()}, len(failed), count)
        for end, count in enumerate(intervals.failures(failed, done.slices))
    ]
    judged = [
        replace(one, low=low.measured, high=high.measured) for one, low, high in zip(judged, *bounds, strict=True)
    ]
    answered = done.latencies[~failed]
    outside = float(np.maximum(0.0, fleet.curve.outside + fleet.curve.spread).mean())
    inside = rate / replicas * float((answered.sum() - len(answered) * outside) / len(failed))
    load = rate / (replicas * fleet.capacity)
    figures = (latency_ms, busiest, load, done.busy, done.batch)
    return Outcome(replicas, rate, len(failed), *figures, tuple(judged), between, inside)


def _growing(fleet: Fleet, replicas: int, rate: float, busiest: float) -> Outcome:
    """Return what a replica does that gets more than it can answer: its queue only grows, however long one waits."""
    latency_ms = dict.fromkeys(("mean", *statistics.PERCENTILES), float("inf"))
    load = rate / (replicas * fleet.capacity) if replicas > 0 else float("inf")
    judged = fleet.objective.judge(latency_ms, 1, failed=1)
    return Outcome(replicas, rate, 0, latency_ms, busiest, load, 1.0, float("nan"), tuple(judged))


def _prepared(fleet: Fleet, replicas: int, rate: float) -> _Run:
    """Return the simulation of a fleet: of a cell of it, or of several like it."""
    slow = fleet.one_by_one
    whole = replicas if fleet.arrivals.recorded is not None else fleet.cell or replicas
    most = LOADED_CELL if slow else whole
    cell = min(replicas, most)
    share = cell / replicas
    least = max(EACH * cell, _span(fleet, rate * share))
    clusters = 1 if slow else max(1, min(-(-LANES // cell), int(fleet.requests / least)))
    generator = np.random.default_rng(fleet.seed)
    picks = [fleet.balancer.pick(cell, replicas, generator) for _ in range(clusters)]
    # Round robin leaves each replica a regular part of the requests, not one by chance.
    thinned = 1.0 if fleet.balancer.name == "round-robin" else share
    return _Run(fleet, cell, rate * share, thinned, clusters, generator, picks)


def _span(fleet: Fleet, rate: float) -> float:
    """Return how many requests come in the time that a simulation should last."""
    return SPAN * fleet.objective.longest * rate


@dataclass(frozen=True)
class _Done:
    """What a simulation did, without its beginning.

    Args:
        latencies: seconds, float64 [n]; infinite of a request that failed.
        slices: the slice of time in which each came.
        busy: the share of time that instances were taken.
        batch: the mean batch.
    """

    latencies: Seconds
    slices: Slices
    busy: float
    batch: float


def _in_lanes(run: _Run) -> _Done:
    fleet, largest, instances = run.fleet, largest_batch(run.fleet.configuration), run.fleet.configuration.instances
    lanes = Lanes(Calls(fleet.curve, largest, run.generator), run.clusters * run.replicas, largest, instances)
    whole = run.count / run.rate
    warm, done, last = WARM * whole, 0, np.zeros(run.clusters)
    kept, when = [], []

    def keep(answered: tuple[Seconds, Seconds]) -> None:
        at, latency = answered
        latency = latency[at >= warm]
        kept.append(latency + fleet.curve.beside(len(latency), run.generator))
        when.append(intervals.slices(at[at >= warm], warm, whole))

    for size in blocks(run.count, max(1, BLOCK // run.clusters)):
        at = [first + np.cumsum(run.gaps(size, done)) for first in last]
        replica = [pick(size, done) + number * run.replicas for number, (pick, _) in enumerate(run.picks)]
        last, done = np.array([times[-1] for times in at]), done + size
        keep(lanes.feed(np.concatenate(at), np.concatenate(replica), np.repeat(last, run.replicas)))
    keep(lanes.finish())
    room = run.clusters * run.replicas * instances * float(last.mean())
    return _Done(
        np.concatenate(kept), np.concatenate(when), min(lanes.busy / room, 1.0), lanes.requests / lanes.batches
    )


def _one_by_one(run: _Run) -> _Done:
    fleet, at = run.fleet, np.cumsum(run.gaps(run.count, 0))
    if fleet.balancer.name == "least-loaded":
        latency, busy, batch = _in_loop(run, at)
    else:
        replicas = Replicas(fleet.curve, fleet.configuration, fleet.seed)
        latency = replicas.run(at, _replica(run))
        busy, batch = replicas.busy, replicas.requests / max(replicas.batches, 1)
    warm = int(WARM * len(at))
    which = intervals.slices(at[warm:], float(at[warm]), float(at[-1]))
    room = run.replicas * fleet.configuration.instances * float(at[-1])
    return _Done(latency[warm:], which, min(busy / room, 1.0), batch)


def _replica(run: _Run) -> Whole:
    """Return where each request of the only cluster goes."""
    ((pick, _),) = run.picks
    return pick(run.count, 0)


def _in_loop(run: _Run, at: Seconds) -> tuple[Seconds, float, float]:
    """Return the latencies, the seconds that instances were taken, and the mean batch."""
    fleet, largest = run.fleet, largest_batch(run.fleet.configuration)
    calls = Calls(fleet.curve, largest, run.generator)
    loop = Loop(calls, run.replicas, largest, fleet.configuration, run.generator)
    latency = loop.run(at) + fleet.curve.beside(len(at), run.generator)
    return latency, loop.busy, len(at) / loop.batches
