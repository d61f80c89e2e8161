"""The ruler, on simulated machines: what it passes, what it calls slower, and what it says that it does not know."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from optimize.judge import ruler
from optimize.judge.ruler import CONTROL, FEWEST, LOOKS, Ratio, Speeds, Until

BATCHES = (1, 32)


@dataclass(frozen=True)
class Machine:
    """What disturbs a visit.

    Args:
        noise: standard deviation of the logarithm of a time.
        lucky: how often all that one opening measures is slower by two fifths.
        phases: how often the machine begins a phase of a few visits in which everything takes three times as long.
    """

    noise: float
    lucky: float = 0.0
    phases: float = 0.0


MACHINES = {"quiet": Machine(0.02), "busy": Machine(0.1, 0.1, 0.05), "worst": Machine(0.2, 0.15)}


@functools.cache
def simulated(machine: Machine, faster: float, seed: int) -> Speeds:
    """Return what the ruler measured of a model that is truly so many times faster than its baseline."""
    rng, now, phase = np.random.default_rng(seed), [0.0], [0]

    def visit(name: str) -> dict[int, float]:
        now[0] += 0.1
        phase[0] = phase[0] - 1 if phase[0] > 0 else int(rng.integers(1, 6) * (rng.random() < machine.phases))
        slow = (3.0 if phase[0] else 1.0) * (1.4 if rng.random() < machine.lucky else 1.0)
        true = {"base": 1.0, "new": 1 / faster}[name]
        return {batch: 1e-3 * batch * true * slow * float(rng.lognormal(0, machine.noise)) for batch in BATCHES}

    return ruler.alternate(visit, ["base", "new"], baseline="base", until=Until(decide=["new"]), clock=lambda: now[0])


def ratios(machine: Machine, faster: float, runs: int) -> list[list[Ratio]]:
    """Return the ratios at all batch sizes, run by run."""
    return [list(simulated(machine, faster, seed).ratios("new", "base").values()) for seed in range(runs)]


@pytest.mark.parametrize("machine", MACHINES, ids=MACHINES)
@pytest.mark.parametrize(("faster", "runs"), [(0.8, 50), (0.9, 200)])
def test_a_slower_model_is_never_passed(machine: str, faster: float, runs: int) -> None:
    found = [ratio.verdict() for run in ratios(MACHINES[machine], faster, runs) for ratio in run]
    assert "not slower" not in found
    assert found.count("slower") > 0.5 * len(found)


@pytest.mark.parametrize("machine", MACHINES, ids=MACHINES)
def test_a_faster_model_is_passed_in_nine_of_ten_runs(machine: str) -> None:
    found = ratios(MACHINES[machine], 1.1, 100)
    assert np.mean([all(ratio.verdict() == "not slower" for ratio in run) for run in found]) >= 0.9


@pytest.mark.parametrize("machine", MACHINES, ids=MACHINES)
@pytest.mark.parametrize(("faster", "runs"), [(0.8, 50), (0.9, 200), (1.1, 100)])
def test_intervals_hold_the_truth_whenever_the_rounds_end(machine: str, faster: float, runs: int) -> None:
    found = [ratio for run in ratios(MACHINES[machine], faster, runs) for ratio in run]
    assert np.mean([ratio.low <= faster <= ratio.high for ratio in found]) >= 0.95


@pytest.mark.parametrize("machine", MACHINES, ids=MACHINES)
def test_a_model_against_itself_is_1(machine: str) -> None:
    runs = [simulated(MACHINES[machine], 1.1, seed) for seed in range(100)]
    for batch in BATCHES:
        controls = [run.control()[batch] for run in runs]
        assert np.mean([control.low <= 1 <= control.high for control in controls]) >= 0.95
        assert np.mean([control.value for control in controls]) == pytest.approx(1, abs=0.02)


def test_a_control_makes_sense_where_luck_is_as_likely_for_both() -> None:
    controls = [ratio for seed in range(100) for ratio in simulated(MACHINES["worst"], 1.1, seed).control().values()]
    assert sum(ratio.senseless for ratio in controls) <= 2


def test_equal_models_are_not_slower_on_a_quiet_machine() -> None:
    assert {ratio.verdict() for run in ratios(MACHINES["quiet"], 1.0, 50) for ratio in run} == {"not slower"}


def counted(took: Callable[[str], float], cost: float = 1.0, **options: object) -> tuple[Speeds, list[list[str]]]:
    """Return the speeds of `base` and `new`, and the order of visits in each round."""
    visits: list[str] = []

    def visit(name: str) -> dict[int, float]:
        visits.append(name)
        return {1: took(name)}

    clock = lambda: len(visits) * cost  # noqa: E731
    found = ruler.alternate(visit, ["base", "new"], baseline="base", until=Until(**options), clock=clock)  # type: ignore[arg-type]
    return found, [visits[at : at + 3] for at in range(0, len(visits), 3)]


def test_a_round_visits_each_once_and_the_baseline_twice_in_an_order_of_its_own() -> None:
    speeds, rounds = counted(lambda name: {"base": 2.0, "new": 1.0}[name])
    assert all(sorted(visited) == ["base", "base", "new"] for visited in rounds)
    assert {visited.index("new") for visited in rounds} == {0, 1, 2}
    assert set(speeds.seconds) == {"base", "new", CONTROL}
    assert speeds.ratios("new", "base")[1].value == pytest.approx(2.0)
    assert speeds.rounds == FEWEST, "nothing is unclear, so that the first look ends it"
    assert counted(lambda name: {"base": 2.0, "new": 1.0}[name])[1] == rounds, "the order is seeded"


def test_only_what_decides_something_is_worth_patience() -> None:
    rng = np.random.default_rng(0)

    def took(name: str) -> float:
        return float(rng.lognormal(0, 0.5))

    assert counted(took, seconds=90.0)[0].rounds == 31
    assert counted(took, seconds=90.0, decide=["new"], patience=60.0)[0].rounds == 51
    assert counted(took, seconds=0.0)[0].rounds == FEWEST
    assert counted(took, seconds=9000.0)[0].rounds == LOOKS[-1]


@pytest.mark.parametrize(("noise", "rounds"), [(0.5, 42), (3.0, 131)], ids=["sound control", "senseless control"])
def test_what_is_slower_at_one_batch_is_not_measured_with_patience_at_another(noise: float, rounds: int) -> None:
    rng, now = np.random.default_rng(0), [0.0]

    def visit(name: str) -> dict[int, float]:
        now[0] += 1.0
        return {1: {"base": 1.0, "new": 2.0}[name], 32: float(rng.lognormal(0, noise))}

    until = Until(decide=["new"], seconds=90.0, patience=300.0)
    found = ruler.alternate(visit, ["base", "new"], baseline="base", until=until, clock=lambda: now[0])
    assert found.rounds == rounds
    assert [ratio.verdict() for ratio in found.ratios("new", "base").values()] == ["slower", "undecided"]


def test_fewer_rounds_than_an_interval_needs_know_nothing() -> None:
    ratio = counted(lambda name: 1.0, rounds=FEWEST - 1)[0].ratios("new", "base")[1]
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 0.0, math.inf)
    assert ratio.verdict() == "undecided"
    assert ratio.document()["high"] is None


def test_nan_decides_nothing_and_makes_no_sense() -> None:
    ratio = counted(lambda name: math.nan if name == "new" else 1.0, seconds=0.0)[0].ratios("new", "base")[1]
    assert ratio.verdict() == "undecided"
    assert ratio.senseless
    assert ratio.document()["value"] is None


@pytest.mark.parametrize(
    ("low", "high", "senseless"),
    [(0.99, 1.01, False), (0.6, 1.7, False), (1.01, 1.02, False), (1.04, 1.2, True), (0.5, 0.96, True), (0.4, 2, True)],
)
def test_a_control_is_senseless_off_1_or_beyond_half_and_double(low: float, high: float, senseless: bool) -> None:
    assert Ratio(1.0, low, high).senseless is senseless


def test_more_rounds_that_decide_grow_with_the_width_squared() -> None:
    speeds = Speeds({"base": {1: [1.0] * 9}}, "base", took=10.0)
    limit = ruler.LIMIT
    assert ruler.more_seconds(Ratio(limit * 1.1, limit * 1.1 / 1.1**2, limit * 1.1 * 1.1**2), speeds) == pytest.approx(
        30
    )
    assert ruler.more_seconds(Ratio(limit, 0.9, 1.1), speeds) == math.inf
    assert ruler.more_seconds(Ratio(1.0, 0.0, math.inf), speeds) == math.inf


def exact(count: int) -> int:
    """Return the rank by counting every way in which ranks can have signs."""
    sums = [sum(rank for rank in range(1, count + 1) if signs >> rank - 1 & 1) for signs in range(2**count)]
    chances = np.cumsum(np.bincount(sums)) / 2**count
    return int((chances <= ruler.ERROR / 2).sum())


@pytest.mark.parametrize("count", [8, 9, 12])
def test_the_rank_is_that_of_the_signed_rank_test(count: int) -> None:
    assert ruler._rank(count) == exact(count)
