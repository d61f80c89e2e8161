"""The simulated scheduler keeps what the real one keeps, whatever the configuration and the load."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.simulate.arrivals import Arrivals, Clients, Kinds
from serve.simulate.batcher import NAP
from serve.simulate.configuration import Configuration, Level
from serve.simulate.result import ANSWERED, EXPIRED, REFUSED, Simulated
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate

EXACT = 1e-9
"""Seconds by which sums of floats may be off."""
TIMES = st.sampled_from([0.0, 0.001, 0.004, 0.02])
LEVELS = st.builds(
    Level, size=st.sampled_from([0, 0, 1, 3]), timeout=TIMES, delayed=st.booleans(), override=st.booleans()
)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    most = draw(st.integers(1, 8))
    return Configuration(
        max_batch=most,
        dynamic=draw(st.integers(0, 9)) > 0,
        delay=draw(TIMES),
        preferred=tuple(draw(st.sets(st.integers(1, most), max_size=3))),
        instances=draw(st.integers(1, 3)),
        fixed_shapes=draw(st.booleans()),
        levels=draw(st.one_of(st.just((Level(),)), st.lists(LEVELS, min_size=1, max_size=3).map(tuple))),
    )


@dataclass(frozen=True)
class Case:
    load: Arrivals | Clients
    curve: Curve
    configuration: Configuration
    seed: int

    def run(self) -> Simulated:
        return simulate(self.load, self.curve, self.configuration, seed=self.seed)

    def column(self, name: str, default: float) -> np.ndarray:
        return np.array(self.load.kinds.column(name, len(self.load), default))


@st.composite
def cases(draw: st.DrawFn, *, simple: bool = False) -> Case:
    configuration, count, seed = draw(configurations()), draw(st.integers(1, 40)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    if simple:
        configuration = replace(configuration, levels=(Level(),), dynamic=True)

    def column(values: Sequence[float]) -> np.ndarray | None:
        return rng.choice(values, count) if draw(st.booleans()) else None

    kinds = Kinds(
        items=column(range(1, configuration.max_batch + 1 + (not simple))),
        level=column(range(len(configuration.levels))),
        timeout=column([0.0, 0.001, 0.004]),
        shape=column([0, 1]),
    )
    gaps = rng.choice([0.0, 0.0005, 0.002, 0.01, 1.2], count, p=[0.2, 0.3, 0.3, 0.15, 0.05])
    clients = Clients(draw(st.integers(1, 9)), count, draw(TIMES), kinds)
    curve = Curve(
        {1: np.array([0.002, 0.003]), 8: np.array([0.005, 0.009, 0.004])},
        together=draw(st.sampled_from([(1.0,), (1.0, 1.5)])),
        outside=draw(TIMES),
        race=draw(st.sampled_from([0.0, 0.5, 1.0])),
        handover=draw(st.sampled_from([0.0, 0.001])),
    )
    load = Arrivals(np.cumsum(gaps), kinds) if simple or draw(st.booleans()) else clients
    return Case(load, curve, configuration, seed)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_each_request_is_answered_once_or_refused_once(case: Case) -> None:
    done = case.run()
    rows, batches, items = done.requests, done.batches, case.column("items", 1)
    assert len(rows) == len(case.load)
    answered = rows["outcome"] == ANSWERED
    assert ((rows["batch"] >= 0) == answered).all() and ((rows["instance"] >= 0) == answered).all()
    assert (rows["start"] >= rows["arrival"]).all() and (rows["end"] >= rows["start"]).all()
    # Each batch holds whole requests, as many samples as it says, and none is larger than the largest.
    inside = Counter[int]()
    for batch, samples in zip(rows["batch"][answered], items[answered], strict=True):
        inside[int(batch)] += int(samples)
    assert [inside[number] for number in range(len(batches))] == batches["items"].tolist()
    assert Counter(rows["batch"][answered].tolist()) == Counter(dict(enumerate(batches["requests"].tolist())))
    assert (batches["items"] <= case.configuration.max_batch).all()
    assert (batches["items"] > 0).all()
    # Too large is refused, an expired one has a timeout, and only a limited queue refuses what fits.
    assert (rows["outcome"][items > case.configuration.max_batch] == REFUSED).all()
    levels = np.array(case.configuration.levels)[rows["level"]]
    for level, outcome, own in zip(levels, rows["outcome"], items, strict=True):
        assert outcome != EXPIRED or (level.timeout and not level.delayed and case.configuration.dynamic)
        assert outcome != REFUSED or own > case.configuration.max_batch or level.size


EXPIRES = Case(
    Clients(3, 14, 0.0, Kinds(items=[3, 2, 2, 1, 1, 1, 1, 1, 1, 3, 2, 3, 2, 2])),
    Curve({1: np.array([0.002]), 8: np.array([0.005])}, outside=0.004, race=0.0),
    Configuration(2, delay=0.001, instances=2, fixed_shapes=True, levels=(Level(timeout=0.001),)),
    0,
)
"""A request that comes finds that another has expired, whose client then goes on."""


@given(cases())
@settings(max_examples=100, deadline=None)
@example(EXPIRES)
def test_an_instance_runs_one_call_at_a_time(case: Case) -> None:
    done = case.run()
    for instance in range(case.configuration.instances):
        own = done.batches[done.batches["instance"] == instance]
        assert (own["start"][1:] >= own["end"][:-1]).all()
    assert (np.diff(done.batches["start"]) >= 0).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_equal_seeds_give_equal_rows(case: Case) -> None:
    one, other = case.run(), case.run()
    assert (one.requests == other.requests).all() and (one.batches == other.batches).all()


@given(cases())
@settings(max_examples=100, deadline=None)
def test_first_in_first_out_within_a_level(case: Case) -> None:
    rows = case.run().requests
    rows = rows[rows["outcome"] == ANSWERED]
    for number, level in enumerate(case.configuration.levels):
        if not (level.timeout and level.delayed):
            assert (np.diff(rows["batch"][rows["level"] == number]) >= 0).all()


def idle_while_waiting(case: Case, done: Simulated) -> np.ndarray:
    """Return for each request the seconds of its wait in which an instance was idle."""
    idle = np.zeros(len(done.requests))
    edges = np.unique(np.concatenate([done.requests["arrival"], done.batches["start"], done.batches["end"]]))
    for begin, end in itertools.pairwise(edges):
        middle = (begin + end) / 2
        busy = ((done.batches["start"] <= middle) & (middle < done.batches["end"])).sum()
        if busy < case.configuration.instances:
            idle += np.where((done.requests["arrival"] <= middle) & (middle < done.requests["start"]), end - begin, 0)
    return idle


@given(cases(simple=True))
@settings(max_examples=100, deadline=None)
def test_none_waits_beyond_the_delay_while_an_instance_is_idle(case: Case) -> None:
    done = case.run()
    assert (idle_while_waiting(case, done) <= case.configuration.delay + EXACT).all()


@given(cases())
@settings(max_examples=100, deadline=None)
@example(
    Case(
        Arrivals(np.array([0.0005, 0.001, 0.011, 0.011, 0.013])),
        Curve({1: np.array([0.002, 0.003])}, race=0.5),
        Configuration(1, fixed_shapes=False, levels=(Level(override=True),)),
        seed=2,
    )
)
def test_without_prefetch_it_may_be_half_a_second_more_for_each_call(case: Case) -> None:
    done = case.run()
    answered, begun = done.requests["outcome"] == ANSWERED, done.batches["start"]
    calls = np.array([((begun > row["arrival"]) & (begun <= row["start"])).sum() for row in done.requests])[answered]
    longest = case.configuration.delay + (NAP * calls if case.curve.race else 0.0)
    if len(case.configuration.levels) == 1 and not case.configuration.levels[0].delayed:
        assert (idle_while_waiting(case, done)[answered] <= longest + EXACT).all()


@given(cases(simple=True))
@settings(max_examples=100, deadline=None)
def test_who_finds_an_idle_instance_waits_a_delay_and_a_call_at_most(case: Case) -> None:
    case = replace(case, configuration=replace(case.configuration, instances=1))
    done = case.run()
    longest = float((done.batches["end"] - done.batches["start"]).max())
    rows, items, shapes = done.requests, case.column("items", 1), case.column("shape", 0)
    for number, row in enumerate(rows):
        before = done.batches[done.batches["start"] < row["arrival"]]
        waiting = np.flatnonzero(rows["start"][: number + 1] >= row["arrival"])
        alike = case.configuration.fixed_shapes or len(set(shapes[waiting])) == 1
        one_call = alike and items[waiting].sum() <= min(case.configuration.sizes)
        if one_call and (before["end"] <= row["arrival"]).all():
            assert row["start"] - row["arrival"] <= case.configuration.delay + longest + EXACT


AT_ONCE = Case(
    Arrivals(np.array([0.0, 0.01, 0.02, 0.02, 0.03])), Curve({1: np.array([0.002])}), Configuration(3, delay=0.02), 0
)
"""The delay of the first ends as others come."""


@given(cases(simple=True))
@example(
    Case(
        Arrivals(np.array([0.019, 0.0195, 0.019 + 0.001, 0.02])),
        Curve({1: np.array([0.001])}, race=0.0),
        Configuration(3, delay=0.001, instances=2, fixed_shapes=False),
        seed=0,
    )
)
@settings(max_examples=300, deadline=None)
@example(AT_ONCE)
def test_a_look_at_each_request_finds_what_counting_finds(case: Case) -> None:
    """Requests that are all alike are counted; one of two samples, long after them, makes all be looked at."""
    case = replace(case, configuration=replace(case.configuration, max_batch=case.configuration.max_batch + 1))
    at = np.asarray(case.load.times())
    alike = replace(case, load=Arrivals(at))
    looked = replace(case, load=Arrivals(np.append(at, 1e3), Kinds(items=[1] * len(at) + [2])))
    assert (alike.run().requests == looked.run().requests[:-1]).all()


def mean(load: Arrivals, curve: Curve, configuration: Configuration) -> float:
    return float(simulate(load, curve, configuration).since(5.0).latencies.mean())


def poisson(rate: float, count: int = 40_000) -> Arrivals:
    return Arrivals(np.cumsum(np.random.default_rng(3).exponential(1 / rate, count)))


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_single_calls_wait_as_the_formula_for_one_server_says(load: float) -> None:
    """M/D/1, Pollaczek and Khinchine."""
    expected = 0.01 * (1 + load / (2 * (1 - load)))
    for configuration in (Configuration(1), Configuration(8, dynamic=False)):
        found = mean(poisson(load / 0.01), Curve({1: np.array([0.01])}), configuration)
        assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("rate", [20, 200, 400, 480])
def test_batches_wait_as_long_as_the_bound_for_linear_times_says(rate: float) -> None:
    """Inoue (2021): calls of a + b·n seconds, no limit to n; his bound is tight but near idleness to saturation."""
    slope, start = 0.0018, 0.002
    load = rate * slope
    light = (slope + start) / (2 * (1 - load)) * (1 + 2 * rate * start + (1 - rate * start) / (1 + load))
    heavy = 1.5 * start / (1 - load) + slope / 2 * (load + 2) / (1 - load**2)
    curve = Curve({size: np.array([start + slope * size]) for size in (1, 1024)})
    found = mean(poisson(rate), curve, Configuration(1024))
    assert 0.9 * min(light, heavy) < found < 1.01 * min(light, heavy)
