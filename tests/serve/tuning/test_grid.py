"""Every configuration in the simulation: which comes first."""

from dataclasses import replace
from typing import Any

import pytest

from serve.planning import objective
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve
from serve.tuning import grid
from serve.tuning.grid import Goal, Outcome, Space
from serve.tuning.live import Traffic
from tests.serve.planning.curves import drawn

TODAY = Configuration(max_batch=8)
SLOWER = 3.0


@pytest.fixture(autouse=True)
def _few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "REQUESTS", 400)


def slower(curve: Curve, times: float) -> Curve:
    return replace(curve, calls={size: seconds * times for size, seconds in curve.calls.items()})


def space(slo: str = "p99 < 20ms", rate: float = 300.0, **more: Any) -> Space:
    together = drawn(together=(1.0, 1.0))
    curves = {1: slower(together, SLOWER), 2: together}
    return Space(
        **{"curves": curves, "today": TODAY, "largest": 8, **more},
        traffic=Traffic(rate),
        objective=objective.parse(slo),
    )


def ranked(asked: Space, goal: Goal) -> list[Outcome]:
    return grid.ranked(asked, goal, lambda _text, _share: None)


def test_all_combinations_are_tried_once() -> None:
    found = list(space().configurations())
    # Two numbers of threads and of instances; a batch of one has no delay, those of 2, 4 and 8 have each.
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 3 * len(grid.DELAYS))


def test_what_is_not_turned_stays() -> None:
    today = replace(TODAY, preferred=(4,), fixed_shapes=False)
    found = list(space(today=today).configurations())
    assert {one.max_batch for one in found} == {4, 8}
    assert all((one.preferred, one.fixed_shapes) == ((4,), False) for one in found)


def test_a_model_without_batches_has_none() -> None:
    found = list(space(largest=0).configurations())
    assert {(one.max_batch, one.dynamic, one.delay) for one in found} == {(1, False, 0.0)}


def test_the_least_latency_takes_the_threads_that_are_fast() -> None:
    best = ranked(space(), "latency")[0]
    assert best.holds
    assert best.configuration.threads == 2


def test_the_fewest_cores_take_one_thread_where_that_holds() -> None:
    best = ranked(space(rate=50), "cores")[0]
    assert (best.configuration.threads, best.configuration.instances) == (1, 1)
    hurried = ranked(space("p50 < 2.5ms", rate=50), "cores")[0]
    assert hurried.configuration.threads == 2


def test_the_highest_rate_is_held_and_not_much_below_what_the_calls_allow() -> None:
    asked = space()
    best = ranked(asked, "throughput")[0]
    assert best.holds
    assert (best.configuration.threads, best.configuration.instances) == (2, 2)
    one = asked.highest(replace(TODAY, threads=2))
    assert one is not None
    assert best.rate > 1.5 * one.rate
    assert not asked.outcome(best.configuration, 1.2 * best.rate).holds


def test_where_none_holds_the_nearest_misses_come_first() -> None:
    found = ranked(space("p99 < 0.5ms"), "latency")
    assert not any(one.holds for one in found)
    assert [one.excess for one in found] == sorted(one.excess for one in found)


def test_equal_seeds_give_equal_outcomes() -> None:
    assert ranked(space(), "latency") == ranked(space(), "latency")


@pytest.mark.parametrize("goal", grid.GOALS)
def test_progress_says_the_best_so_far(goal: Goal) -> None:
    told: list[str] = []
    grid.ranked(space(), goal, lambda text, _share: told.append(text))
    assert "best so far" in told[-1]
