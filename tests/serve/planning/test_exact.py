"""Delays, preferred sizes and limits of the queue in a fleet, and how far chance moves its figures."""

from dataclasses import replace

import numpy as np

from serve.planning import objective
from serve.planning.arrivals import POISSON, Arrivals
from serve.planning.cases import Asked
from serve.planning.engines.balancers import Balancer
from serve.planning.engines.exact import Replicas
from serve.planning.fleet import Fleet, simulate
from serve.planning.intervals import SLICES, around, failures
from serve.planning.plan import Wanted, make
from serve.simulate import simulation
from serve.simulate.arrivals import scheduled
from serve.simulate.configuration import Configuration, Level
from tests.serve.planning.curves import drawn

SLO = objective.parse("p99 < 12ms, errors < 0.1%")
PLAIN = Fleet(drawn(), Configuration(32), SLO, POISSON, requests=40_000)
SHORT = Configuration(32, levels=(Level(size=6),))
"""So short a queue is full now and then in bursts."""


def test_replicas_are_each_what_the_simulation_says() -> None:
    at = np.asarray(scheduled(2000.0, 2.0).at)
    replica = np.arange(len(at)) % 2
    configuration = Configuration(32, delay=0.001, instances=2)
    fleet = Replicas(drawn(), configuration, seed=4)
    latency = fleet.run(at, replica)
    for number in range(2):
        alone = simulation.simulate(simulation.Arrivals(at[replica == number]), drawn(), configuration, seed=4 + number)
        np.testing.assert_array_equal(latency[replica == number], alone.latencies)
    assert fleet.requests == len(at)


def test_a_delay_is_simulated_and_costs_what_it_costs() -> None:
    """With fixed shapes, up to another call: at a low rate a request waits the whole delay at least."""
    without, delayed = (
        simulate(replace(PLAIN, configuration=Configuration(32, delay=delay)), 4, 4 * 100.0) for delay in (0.0, 0.003)
    )
    assert delayed.latency_ms["p50"] > without.latency_ms["p50"] + 2.5
    assert delayed.batch > without.batch


def test_a_full_queue_is_an_error_that_the_objective_counts() -> None:
    bursts = Arrivals("gamma:4", 4.0)
    fleet = replace(PLAIN, arrivals=bursts, configuration=SHORT, balancer=Balancer("round-robin"), cell=1)
    few, many = simulate(fleet, 1, 900.0), simulate(fleet, 1, 90.0)
    errors = few.judged[1]
    assert errors.text == "errors < 0.1%" and not errors.passed
    assert few.binding is errors or few.latency_ms["p99"] == np.inf
    assert 0.1 < errors.low < errors.measured < errors.high < 100
    assert many.judged[1].measured < errors.measured
    # What is refused is in no replica: at most a full queue and a full batch.
    assert 0 < few.inside < 6 + 32


def test_queues_that_only_grow_answer_nobody() -> None:
    fleet = replace(PLAIN, objective=objective.parse("errors < 0.1%"))
    assert not simulate(fleet, 1, 2 * fleet.capacity).holds
    assert not simulate(fleet, 0, 1.0).holds


def test_intervals_hold_what_other_seeds_say() -> None:
    """Of 95 % intervals from ten slices about nine in ten hold the mean of many simulations."""
    found = [simulate(replace(PLAIN, seed=seed), 20, 20 * 1500.0) for seed in range(20)]
    for key in ("p50", "p99"):
        middle = np.mean([one.latency_ms[key] for one in found])
        held = [one.interval_ms[key][0] <= middle <= one.interval_ms[key][1] for one in found]
        assert sum(held) >= 15
    widths = [np.diff(one.interval_ms["p99"])[0] for one in found]
    more = simulate(replace(PLAIN, requests=640_000), 20, 20 * 1500.0)
    assert np.diff(more.interval_ms["p99"])[0] < np.mean(widths)
    judged = found[0].judged[0]
    assert (judged.low, judged.high) == found[0].interval_ms["p99"]
    assert "max" not in found[0].interval_ms


def test_what_chance_may_say() -> None:
    assert around(2.0, [2.0] * SLICES) == (2.0, 2.0)
    assert around(np.inf, [1.0] * 9 + [np.inf]) == (1.0, np.inf)
    nobody = np.zeros(50, bool)
    assert failures(nobody, np.repeat(np.arange(SLICES), 5).astype(np.int8)) == (0.0, 3.0)


def test_a_plan_with_limits_says_how_it_was_made() -> None:
    fleet = replace(PLAIN, configuration=SHORT, requests=20_000, objective=objective.parse("p99 < 50ms"))
    plan = make(fleet, Wanted(3000.0, Asked(fail=0)), lambda _text, _fraction: None)
    assert not any("not simulated" in note for note in plan["notes"])
    conditions = plan["planned"]["conditions"]
    assert conditions[0]["low"] <= conditions[0]["measured"] <= conditions[0]["high"]
    assert set(plan["planned"]["interval_ms"]) >= {"mean", "p50", "p99"}
