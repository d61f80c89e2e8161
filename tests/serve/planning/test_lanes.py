"""The lanes do what one replica after the other would do, request by request."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.planning import BALANCERS, objective
from serve.planning import fleet as fleets
from serve.planning.arrivals import POISSON
from serve.planning.engines.balancers import Balancer
from serve.planning.engines.calls import Calls, capacity
from serve.planning.engines.lanes import Lanes
from serve.planning.engines.leastloaded import Loop
from serve.planning.fleet import Fleet, simulate
from serve.simulate import simulation as exact
from serve.simulate.arrivals import Arrivals
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve, Seconds
from tests.serve.planning.curves import drawn

CONFIGURATION = Configuration(32)
SLO = objective.parse("p99 < 20ms")


def one_replica(at: Seconds, curve: Curve, largest: int, instances: int = 1, seed: int = 0) -> Seconds:
    """The oracle of these tests: one replica without a delay, as Triton's scheduler has it."""
    return exact.simulate(Arrivals(at), curve, Configuration(largest, instances=instances), seed=seed).latencies


def arrived(replicas: int, each: int, rate: float, seed: int) -> tuple[Seconds, np.ndarray]:
    """Return arrivals at all replicas in their order, and where each goes."""
    generator = np.random.default_rng(seed)
    at = np.cumsum(generator.standard_exponential(replicas * each)) / (rate * replicas)
    return at, generator.integers(replicas, size=len(at))


def by_arrival(answers: list[tuple[Seconds, Seconds]]) -> Seconds:
    at, latency = (np.concatenate(column) for column in zip(*answers, strict=True))
    ordered: Seconds = latency[np.argsort(at, kind="stable")]
    return ordered


@pytest.mark.parametrize("rate", [50.0, 900.0, 3000.0])
@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("size", [97, 100_000])
def test_with_equal_calls_every_request_takes_what_it_takes_one_by_one(rate: float, instances: int, size: int) -> None:
    curve = drawn(spread=0, together=(1.0, 1.5, 2.5), inside=0.0003)
    at, replica = arrived(5, 400, rate, seed=3)
    lanes = Lanes(Calls(curve, 32, np.random.default_rng(0)), 5, 32, instances)
    answers = []
    for begin in range(0, len(at), size):
        block = slice(begin, begin + size)
        answers.append(lanes.feed(at[block], replica[block], at[block][-1]))
    answers.append(lanes.finish())
    expected = np.empty(len(at))
    for number in range(5):
        mine = replica == number
        expected[mine] = one_replica(at[mine], curve, 32, instances)
    np.testing.assert_allclose(by_arrival(answers), expected, rtol=1e-9)
    assert lanes.requests == len(at)


@given(
    gaps=st.lists(st.floats(1e-5, 0.01), min_size=1, max_size=60),
    replicas=st.integers(1, 3),
    largest=st.integers(1, 4),
    instances=st.integers(1, 3),
    block=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_is_answered_as_one_by_one(
    gaps: list[float], replicas: int, largest: int, instances: int, block: int
) -> None:
    curve, at = drawn(spread=0, together=(1.0, 1.5)), np.cumsum(gaps)
    replica = np.arange(len(at)) % replicas
    lanes = Lanes(Calls(curve, largest, np.random.default_rng(0)), replicas, largest, instances)
    pieces = [slice(begin, begin + block) for begin in range(0, len(at), block)]
    answers = [lanes.feed(at[piece], replica[piece], at[piece][-1]) for piece in pieces]
    answered = by_arrival([*answers, lanes.finish()])
    for number in range(replicas):
        mine = replica == number
        np.testing.assert_allclose(answered[mine], one_replica(at[mine], curve, largest, instances), rtol=1e-9)


@pytest.mark.parametrize(("rate", "instances"), [(400.0, 1), (1500.0, 1), (2500.0, 1), (1500.0, 2)])
def test_twenty_replicas_agree_within_two_per_cent(rate: float, instances: int) -> None:
    curve = drawn(together=(1.0, 1.4), inside=0.0003)
    at, replica = arrived(20, 10_000, rate, seed=5)
    lanes = Lanes(Calls(curve, 32, np.random.default_rng(1)), 20, 32, instances)
    ours = by_arrival([lanes.feed(at, replica, np.inf)])
    theirs = np.concatenate([one_replica(at[replica == n], curve, 32, instances, seed=n) for n in range(20)])
    for percent in (50, 99):
        assert np.percentile(ours, percent) == pytest.approx(np.percentile(theirs, percent), rel=0.02)


def test_calls_are_drawn_as_the_curve_draws_them() -> None:
    curve = Curve({2: np.array([1.0, 3.0]), 8: np.array([5.0, 9.0])}, (1.0, 2.0), inside=0.5)
    calls, sample = Calls(curve, 20, np.random.default_rng(0)), curve.sampler(np.random.default_rng(0))
    for batch in (1, 2, 3, 5, 8, 20):
        for running in (1, 2, 3):
            drawn = calls.draw(np.full(4000, batch), np.full(4000, running))
            one_by_one = [sample(batch, running) for _ in range(4000)]
            assert {round(value, 9) for value in drawn} == {round(value, 9) for value in one_by_one}
            assert drawn.mean() == pytest.approx(np.mean(one_by_one), rel=0.04)


def test_a_queue_whose_times_are_known() -> None:
    """M/M/1: its time in the system is exponential."""
    generator = np.random.default_rng(0)
    curve = Curve({1: 0.001 * generator.standard_exponential(200_000)})
    found = simulate(Fleet(curve, Configuration(1), SLO, POISSON, requests=1_000_000), 100, 100 * 600.0)
    spare = 1 / curve.calls[1].mean() - 600.0
    assert found.latency_ms["p50"] == pytest.approx(np.log(2) / spare * 1e3, rel=0.02)
    assert found.latency_ms["p99"] == pytest.approx(np.log(100) / spare * 1e3, rel=0.05)
    assert found.utilization == pytest.approx(0.6, rel=0.02)
    assert found.batch == 1


def test_memory_does_not_grow_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "BLOCK", 50_000)
    fleet = Fleet(drawn(), CONFIGURATION, SLO, POISSON, requests=1_000_000, cell=0)
    simulate(replace(fleet, requests=100_000), 256, 256_000.0)
    tracemalloc.start()
    found = simulate(fleet, 2000, 2_000_000.0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.requests > 850_000
    # The latencies, twice while they are sorted, and what a block takes.
    assert most < 4 * 8 * found.requests


def test_a_loop_over_one_replica_is_the_oracle() -> None:
    curve = drawn(spread=0, together=(1.0, 1.5), inside=0.0003)
    at, _ = arrived(1, 3000, 1500.0, seed=9)
    generator = np.random.default_rng(0)
    loop = Loop(Calls(curve, 32, generator), 1, 32, replace(CONFIGURATION, instances=2), generator)
    expected = one_replica(at, curve, 32, 2)
    np.testing.assert_allclose(loop.run(at), expected, rtol=1e-9)


def test_least_loaded_sends_to_those_with_the_fewest() -> None:
    curve = Curve({1: np.array([1.0])})
    generator = np.random.default_rng(0)
    loop = Loop(Calls(curve, 1, generator), 3, 1, Configuration(1), generator)
    at = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    ends = at + loop.run(at)
    # Three find an idle replica, and of two that come later none waits behind the other.
    assert ends[:3] == pytest.approx(at[:3] + 1)
    assert len({round(end, 6) for end in ends[3:]} & {2.0, 2.1, 2.2}) == 2


@pytest.mark.parametrize("instances", [1, 2])
def test_at_capacity_queues_only_grow(instances: int) -> None:
    curve, configuration = drawn(together=(1.0, 1.4)), Configuration(32, instances=instances)
    most = capacity(curve, configuration)
    fleet = Fleet(curve, configuration, objective.parse("p99 < 10s"), POISSON, requests=50_000)
    assert not simulate(fleet, 3, 3.001 * most).holds
    assert simulate(fleet, 3, 3 * 0.95 * most).holds


def test_balancers_stand_in_the_order_that_theory_gives_them() -> None:
    """Calls of one request that take exponential times, where the shortest queue is the best choice."""
    curve = Curve({1: 0.001 * np.random.default_rng(0).standard_exponential(10_000)})
    fleet = Fleet(curve, Configuration(1), SLO, POISSON, requests=50_000)
    p99 = {
        name: simulate(replace(fleet, balancer=Balancer(name, 1000)), 20, 20 * 600.0).latency_ms["p99"]
        for name in BALANCERS
    }
    assert sorted(p99, key=p99.__getitem__) == ["least-loaded", "round-robin", "random", "pinned"]


def test_a_cell_is_as_the_whole() -> None:
    fleet = Fleet(drawn(), CONFIGURATION, SLO, POISSON, requests=400_000)
    whole = simulate(replace(fleet, cell=0), 1000, 1_500_000.0)
    cell = simulate(replace(fleet, cell=250), 1000, 1_500_000.0)
    for key in ("p50", "p99"):
        assert cell.latency_ms[key] == pytest.approx(whole.latency_ms[key], rel=0.02)


def test_pinned_clients_make_replicas_unequal() -> None:
    """Exponential rates of many clients: a replica with k of them gets a sum of k, the busiest the most."""
    for cell in (0, 500):
        fleet = Fleet(drawn(), CONFIGURATION, SLO, POISSON, Balancer("pinned", 20_000), requests=200_000, cell=cell)
        found = simulate(fleet, 2000, 2000 * 500.0)
        # Of 10 clients each: ten rates summed, the number itself by chance: CV² = 2 / 10, and the largest of 2,000.
        assert 2 < found.busiest / 500.0 < 4
        assert simulate(replace(fleet, balancer=Balancer("random")), 2000, 1e6).busiest == pytest.approx(500)
        limit = fleet.capacity / (found.busiest / 500.0)
        assert simulate(fleet, 2000, 0.99 * limit * 2000).requests
        assert not simulate(fleet, 2000, 1.01 * limit * 2000).requests
