import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.probing import edge, probe, report
from loadtest.probing import search as capacity
from loadtest.probing.probe import conditions
from loadtest.probing.search import (
    CLIENT,
    CLIENT_LIMIT,
    DISTURBANCE,
    DISTURBED,
    FAILED,
    GROWING,
    HELD,
    NARROW,
    NONE_HOLDS,
    SETTLING,
    SPENT,
    Budget,
    Probe,
)
from loadtest.selftest import nullserver

BUDGET = 150.0


@pytest.fixture(scope="module")
def queues() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "queues.py"
    spec = importlib.util.spec_from_file_location("queues", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["queues"] = module
    spec.loader.exec_module(module)
    return module


def searched(queue, start: float, allowed: list[float]) -> capacity.Found:
    return capacity.search(queue.probe, allowed, start, Budget(10, BUDGET + 10, lambda: queue.seconds))


def made(rate: float, share: float, count: int = 1000, **more) -> Probe:
    """A probe without chance: every stretch has the same share of bad requests."""
    counted = np.full((1, edge.BLOCKS), count)
    return Probe(rate, counted, np.round(counted * share).astype(np.int64), np.full(edge.BLOCKS, 0.01), **more)


def stepwise(at: float, **more):
    """A server that holds everything below a rate and nothing above it, as one with equally spaced arrivals does."""
    return lambda rate, seconds: made(rate, 0.0 if rate < at else 1.0, **more)


def test_the_formula_and_the_simulated_queue_agree(queues) -> None:
    for fixed, limit in ((True, 0.02), (True, 0.05), (False, 0.05)):
        truth = (queues.fixed_edge if fixed else queues.random_edge)(0.005, limit, 0.01)
        probe = queues.Queue(0.005, [limit], fixed, seed=1).probe(truth, 20_000.0)
        assert probe.bad.sum() / probe.counted.sum() == pytest.approx(0.01, rel=0.1)


class Case(NamedTuple):
    """A queue whose capacity is known, and what is asked of it."""

    name: str
    fixed: bool
    service: float
    limits: list[float]
    shares: list[float]

    def truth(self, queues: ModuleType) -> float:
        edge_of = queues.fixed_edge if self.fixed else queues.random_edge
        return min(edge_of(self.service, *one) for one in zip(self.limits, self.shares, strict=True))


FIXED = Case("M/D/1 2 ms, p99 < 20 ms", True, 0.002, [0.02], [0.01])
RANDOM = Case("M/M/1 1 ms, p99 < 20 ms", False, 0.001, [0.02], [0.01])
SLOW = Case("M/M/1 5 ms, p99 < 50 ms", False, 0.005, [0.05], [0.01])
SAME = Case("M/D/1 2 ms, p99 < 20 ms three times", True, 0.002, [0.02] * 3, [0.01] * 3)
"""Conditions that cannot depend on each other more."""


def dependent(queues: ModuleType) -> Case:
    """Three percentiles of the same latencies that pass their limits at the same rate."""
    rate, shares = queues.random_edge(0.001, 0.02, 0.01), [0.01, 0.1, 0.5]
    limits = [queues.random_limit(0.001, rate, share) for share in shares]
    return Case("M/M/1 1 ms, p99, p90 and p50", False, 0.001, limits, shares)


def coverage(queues: ModuleType, case: Case, moves: float, runs: int) -> tuple[float, np.ndarray, float]:
    """Search again and again; return how often the interval held the truth, the estimates as shares of it, and the
    median of half the interval's width."""
    truth, rows = case.truth(queues), []
    for seed in range(runs):
        queue = queues.Queue(case.service, case.limits, case.fixed, seed, moves)
        found = searched(queue, 0.7 / case.service, case.shares)
        assert found.stopped in (NARROW, SPENT)
        rows.append((found.rate / truth, found.low / truth, found.high / truth, len(found.probes)))
    ratio, low, high, probes = np.array(rows).T
    covered, width = float(((low <= 1) & (high >= 1)).mean()), float(np.median((high - low) / 2 / ratio))
    print(
        f"\n{case.name}, service time moves {moves:.0%}: covered {covered:.0%} of {runs}, mean {ratio.mean():.3f}, "
        f"spread {ratio.std():.3f}, median half width {width:.1%}, {np.median(probes):.0f} probes"
    )
    return covered, ratio, width


def test_the_interval_of_a_staged_queue_covers_the_truth(queues) -> None:
    covered, ratio, width = coverage(queues, FIXED, 0.0, 20)
    assert covered >= 0.9
    assert np.mean(np.abs(ratio - 1) <= 0.05) >= 0.9
    assert width < 0.07


@pytest.mark.parametrize("moves", [0.03, 0.06])
def test_the_interval_covers_the_truth_when_the_service_time_moves_between_probes(queues, moves: float) -> None:
    covered, ratio, width = coverage(queues, FIXED, moves, 20)
    assert covered >= 0.9
    assert abs(ratio.mean() - 1) < 0.03
    assert width < 0.1


@pytest.mark.parametrize("three", [lambda _: SAME, dependent], ids=["the same", "percentiles"])
def test_the_interval_covers_the_truth_of_three_conditions_that_depend_on_each_other(queues, three) -> None:
    covered, ratio, width = coverage(queues, three(queues), 0.0, 12)
    assert covered >= 0.9
    assert abs(ratio.mean() - 1) < 0.05
    assert width < 0.12


@pytest.mark.skipif("COVERAGE" not in os.environ, reason="`make coverage` sweeps all of them")
@pytest.mark.parametrize("moves", [0.0, 0.03, 0.06])
@pytest.mark.parametrize("case", [*(lambda _, one=one: one for one in (FIXED, RANDOM, SLOW, SAME)), dependent])
def test_the_interval_covers_the_truth_in_nine_of_ten_searches(queues, case, moves: float) -> None:
    covered, ratio, _ = coverage(queues, case(queues), moves, int(os.environ["COVERAGE"]))
    assert covered >= 0.9
    assert abs(ratio.mean() - 1) < 0.05


@pytest.mark.timed
def test_the_capacity_of_a_queue_over_a_socket_is_what_the_formula_says(queues: ModuleType) -> None:
    service, limit = 0.01, 0.06
    asked = probe.conditions([f"p90 < {limit * 1e3:g}ms"])
    parts = [Part("null", payload.generate(nullserver.INPUTS, 1, 0))]
    with nullserver.running(service=service) as server:
        plan = Plan(server.http, 1.0, rate=1.0, arrival="poisson")
        found = capacity.search(
            probe.prober(plan, parts, asked),
            [one.allowed for one in asked],
            0.7 / service,
            Budget(2.0, 22.0),
        )
    truth = queues.fixed_edge(service, limit, 0.1)
    print(
        f"\n{found.rate:.1f} [{found.low:.1f}, {found.high:.1f}] requests/s, the truth is {truth:.1f}: {found.verdicts}"
    )
    assert found.binding == 0
    assert found.low <= truth <= found.high
    assert found.rate == pytest.approx(truth, rel=0.15)


@pytest.mark.parametrize("start", [1.0, 90.0, 5000.0])
def test_a_step_is_found_from_any_start(start: float) -> None:
    found = capacity.search(stepwise(100.0), [0.01], start, Budget(10))
    assert found.stopped == NARROW
    assert found.low < 100 < found.high
    assert found.rate == pytest.approx(100, rel=0.05)
    assert found.binding == 0
    assert len(found.probes) < 30


def test_nothing_holds() -> None:
    found = capacity.search(lambda rate, _: made(rate, 0.5), [0.01], 100.0, Budget(10))
    assert found.stopped == NONE_HOLDS
    assert np.isnan(found.rate)
    assert found.binding == 0


def test_what_the_client_cannot_send_is_a_lower_limit_of_the_capacity() -> None:
    def probe(rate: float, _: float) -> Probe:
        return made(rate, 0.5, client="late") if rate > 300 else made(rate, 0.0)

    found = capacity.search(probe, [0.01], 100.0, Budget(10))
    assert found.stopped == CLIENT_LIMIT
    assert 300 / 1.1 < found.rate <= 300
    assert found.high == float("inf")
    assert set(found.verdicts) == {HELD, CLIENT}


def test_what_held_with_the_lateness_of_the_client_in_it_held() -> None:
    late = [made(*share, client="late") for share in ((80, 0.001), (120, 0.0, 5), (90, 0.5))]
    assert capacity.held_although_late([made(50, 0.0), *late], [0.01]) == 80, "at 120 there is too little to say so"
    assert capacity.held_although_late([made(50, 0.0)], [0.01]) == 0
    for slo, held in (("p99 < 20ms", 64.0), ("service p99 < 20ms", None)):
        asked = conditions([slo])
        one = made(64.0, 0.0, client="late", facts={"requests": 9})
        one = replace(one, counted=one.counted.repeat(len(asked), 0), bad=one.bad.repeat(len(asked), 0))
        nothing = float("nan")
        found = capacity.Found(nothing, 0.0, nothing, CLIENT_LIMIT, None, [one], [CLIENT])
        values = report.document_of(found, asked, slo)
        assert values["held_although_late"] == held
        assert any("64.0/s held all the same" in note for note in values["notes"]) is bool(held)


def test_a_hiccup_of_the_client_is_not_its_limit() -> None:
    seen = iter(range(10**6))

    def probe(rate: float, _: float) -> Probe:
        return made(rate, 0.0 if rate < 100 else 1.0, client="late" if next(seen) in (0, 1, 3, 5) else "")

    found = capacity.search(probe, [0.01], 10.0, Budget(10))
    assert found.stopped == NARROW
    assert found.rate == pytest.approx(100, rel=0.05)


def test_a_machine_that_holds_up_an_idle_client_is_tried_longer() -> None:
    seen = iter(range(10**6))

    def often(rate: float, _: float) -> Probe:
        held_up = next(seen) % 6 < 4
        return made(rate, 0.0 if rate < 100 else 1.0, client="late" if held_up else "", idle=held_up)

    found = capacity.search(often, [0.01], 60.0, Budget(10))
    assert found.stopped == NARROW
    assert found.rate == pytest.approx(100, rel=0.05)
    assert DISTURBED in found.verdicts

    def at_last(rate: float, _: float) -> Probe:
        late = next(asked) > 6
        return made(rate, 0.0 if rate < 100 else 1.0, client="late" if late else "", idle=late)

    asked = iter(range(10**6))
    found = capacity.search(at_last, [0.01], 60.0, Budget(10))
    assert found.stopped == DISTURBANCE
    assert found.rate == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("fails", [900.0, float("inf")])
def test_a_client_that_is_late_at_high_rates_goes_lower(fails: float, idle: bool) -> None:
    # The server's own work holds up a client beside it, which has cores to spare.
    def probe(rate: float, _: float) -> Probe:
        late = 300 < rate < fails
        return made(rate, 0.0 if rate < fails else 1.0, client="late" if late else "", idle=late and idle)

    found = capacity.search(probe, [0.01], 1000.0, Budget(10))
    assert found.stopped in (CLIENT_LIMIT, DISTURBANCE)
    assert found.low <= 300
    assert found.rate >= 250
    assert found.high > 800
    assert len(found.probes) < 50


def test_probes_that_do_not_count_change_nothing() -> None:
    seen = iter(range(10**6))

    def probe(rate: float, _: float) -> Probe:
        # Every third one is disturbed, by the client or by a server that is still warming up.
        odd = next(seen) % 6
        if odd == 2:
            return made(rate, 1.0, client="late")
        found = made(rate, 0.0 if rate < 100 else 1.0)
        return Probe(rate, found.counted, found.counted, np.geomspace(1, 0.1, edge.BLOCKS)) if odd == 5 else found

    found = capacity.search(probe, [0.01], 60.0, Budget(10))
    assert found.stopped == NARROW
    assert found.rate == pytest.approx(100, rel=0.05)
    assert SETTLING in found.verdicts


def test_a_server_that_never_settles_and_a_spent_budget_end_the_search() -> None:
    def falling(rate: float, _: float) -> Probe:
        return Probe(rate, *(made(rate, 0.0).counted for _ in range(2)), np.geomspace(1, 0.1, edge.BLOCKS))

    found = capacity.search(falling, [0.01], 60.0, Budget(10))
    assert found.stopped == capacity.UNSETTLED
    found = capacity.search(stepwise(100.0), [0.01], 60.0, Budget(10, 0))
    assert found.stopped == SPENT
    assert found.rate == 60
    assert found.high == float("inf")


def test_a_growing_queue_holds_nothing_however_few_requests_were_slow() -> None:
    still = made(100.0, 0.0)
    growing = Probe(100.0, still.counted, still.bad, np.linspace(0.001, 0.01, edge.BLOCKS))
    assert capacity.verdict(growing, [0.01]) == GROWING
    assert growing.counts(0).bad.sum() == growing.counted.sum()
    assert capacity.verdict(made(100.0, 0.0, fault="full"), [0.01]) == FAILED
    assert capacity.trend(np.full(edge.BLOCKS, np.nan)) == 1


def test_the_condition_that_fails_first_is_named() -> None:
    def probe(rate: float, _: float) -> Probe:
        counted = np.full((2, edge.BLOCKS), 1000)
        bad = np.array([[0 if rate < 200 else 1000] * edge.BLOCKS, [0 if rate < 100 else 300] * edge.BLOCKS])
        return Probe(rate, counted, bad, np.full(edge.BLOCKS, 0.01))

    found = capacity.search(probe, [0.01, 0.001], 400.0, Budget(10))
    assert found.binding == 1
    assert found.rate == pytest.approx(100, rel=0.05)


def test_clusters_of_bad_requests_widen_the_interval() -> None:
    rates = edge.grid([90.0, 110.0])
    even, counted = np.full(10, 10), np.full(10, 1000)
    clustered = np.array([100, 0, 0, 0, 0, 0, 0, 0, 0, 0])

    def width(low: np.ndarray, high: np.ndarray) -> float:
        found = edge.edge([edge.Counts(90.0, counted, low), edge.Counts(110.0, counted, high)], 0.015, rates)
        return found.at(0.975) - found.at(0.025)

    assert width(clustered, 3 * clustered) > 2 * width(even, 3 * even)


def test_probes_that_contradict_each_other_widen_the_interval() -> None:
    def width(*shares: float) -> float:
        rates = [95.0, 97.0, 99.0, 101.0, 103.0, 105.0]
        probes = [made(rate, share).counts(0) for rate, share in zip(rates, shares, strict=True)]
        found = edge.edge(probes, 0.01, edge.grid(rates))
        return found.at(0.975) - found.at(0.025)

    # The same numbers; in the one order the share grows with the rate, in the other it depends on the probe.
    assert width(0.02, 0.004, 0.016, 0.006, 0.025, 0.008) > 2 * width(0.004, 0.006, 0.008, 0.016, 0.02, 0.025)


def test_the_lowest_of_equal_edges_is_no_lower_than_each() -> None:
    one = edge.edge([made(rate, 0.01 * rate / 100).counts(0) for rate in (90.0, 110.0)], 0.01, edge.grid([90.0, 110.0]))
    rate, low, high = edge.first([one], 0.95)
    assert edge.first([one] * 3, 0.95)[:2] == (rate, low)
    # Were their errors apart, each would have to be as high with a third of the chance.
    assert edge.first([one] * 3, 0.95)[2] > high
