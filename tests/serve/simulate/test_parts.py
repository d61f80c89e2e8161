"""The parts of the simulation, each alone, and single cases that can be counted by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.plan import schedule
from modelathe.errors import BadInput
from serve.config import model_config
from serve.simulate.arrivals import Arrivals, Clients, Kinds, recorded, scheduled
from serve.simulate.configuration import Configuration, Level, stated
from serve.simulate.fitting import Run, fitted
from serve.simulate.result import ANSWERED, EXPIRED, REFUSED, Simulated
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate

SECOND = Curve({1: np.array([1.0])}, race=0.0)
"""A call of n samples takes n seconds."""
FLAT = Curve({1: np.array([1.0]), 64: np.array([1.0])}, race=0.0)


def sizes(done: Simulated) -> list[int]:
    return [int(size) for size in done.batches["items"]]


def draws(curve: Curve, batch: int, running: int = 1, count: int = 2000) -> np.ndarray:
    seconds = curve.sampler(np.random.default_rng(1))
    return np.array([seconds(batch, running) for _ in range(count)])


def test_times_are_those_that_were_measured() -> None:
    curve = Curve({1: np.array([3.0, 1.0, 2.0]), 4: np.array([10.0, 30.0])}, inside=0.5, together=(1.0, 2.0))
    assert set(draws(curve, 1)) == {1.5, 2.5, 3.5}
    assert set(draws(curve, 4)) == {10.5, 30.5}
    assert set(draws(curve, 8)) == {20.5, 60.5}
    assert set(draws(curve, 4, running=2)) == set(draws(curve, 4, running=7)) == {20.5, 60.5}
    between = draws(curve, 2)
    assert between.min() == pytest.approx(1 * 2 / 3 + 10 / 3 + 0.5)
    assert between.max() == pytest.approx(3 * 2 / 3 + 30 / 3 + 0.5)
    assert np.unique(draws(curve, 1)[:300], return_counts=True)[1].min() > 60


def test_sizes_below_the_smallest_take_its_times() -> None:
    assert set(draws(Curve({4: np.array([2.0])}), 1)) == {2.0}


def test_two_configurations_have_the_same_luck() -> None:
    slow, fast = (Curve({1: np.arange(100.0) * scale}) for scale in (2, 1))
    np.testing.assert_allclose(draws(slow, 1), 2 * draws(fast, 1))


def test_arrivals_are_those_of_the_load_generator(tmp_path: Path) -> None:
    made = scheduled(50, 4.0, 3, "gamma:burstiness=0.5", "ramp:to=100")
    assert made.times() == list(schedule.times(50, 4.0, 3, "gamma:burstiness=0.5", "ramp:to=100"))
    (tmp_path / "trace.txt").write_text("5\n5.5\n7\n")
    assert recorded(tmp_path / "trace.txt", speed=2).times() == [0, 0.25, 1]
    with pytest.raises(BadInput, match="no such file"):
        recorded(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (Arrivals([1.0, 0.0]), "in order"),
        (Arrivals([0.0], Kinds(items=[1, 1])), "items has 2 values for 1 requests"),
        (Arrivals([0.0], Kinds(level=[1])), "levels are counted from 0 to 0"),
        (Arrivals([0.0], Kinds(items=[0])), "at least one sample"),
    ],
)
def test_arrays_that_do_not_fit(load: Arrivals, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        simulate(load, FLAT, Configuration(4))


def test_no_request_at_all() -> None:
    done = simulate(Arrivals([]), FLAT, Configuration(4))
    assert done.requests.size == done.batches.size == done.failed == 0
    assert np.isnan([done.quantile(0.5), done.mean_batch, done.throughput, done.busy]).all()


CONFIG = """
max_batch_size: 16 input { name: "x" data_type: TYPE_FP32 dims: %s } parameters { key: "intra_op_thread_count" value {
string_value: "3" } } instance_group { count: 2 kind: KIND_CPU } %s
"""


def test_a_configuration_is_read() -> None:
    queues = """dynamic_batching { max_queue_delay_microseconds: 1500 preferred_batch_size: [8, 4] priority_levels: 2
        default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 20000 allow_timeout_override: true }
        priority_queue_policy { key: 1 value { timeout_action: DELAY } } }"""
    levels = Level(delayed=True), Level(size=7, timeout=0.02, override=True)
    read = stated(model_config.parse(CONFIG % (-1, queues)))
    assert read == Configuration(16, True, 0.0015, (8, 4), 2, False, levels, 3)
    assert read.sizes == (4, 8) and not read.prefetches
    plain = stated(model_config.parse(CONFIG % (1, "dynamic_batching {}")))
    assert plain == Configuration(16, instances=2, threads=3) and plain.sizes == (16,) and plain.prefetches
    assert not stated(model_config.parse(CONFIG % (1, ""))).dynamic


def test_what_waits_goes_together() -> None:
    done = simulate(Arrivals([0.0, 0.1, 0.2, 0.3, 5.0]), FLAT, Configuration(2))
    assert sizes(done) == [1, 2, 1, 1]
    assert done.requests["start"].tolist() == [0, 1, 1, 2, 5]
    assert done.histogram == {1: 3, 2: 1}
    assert (done.mean_batch, done.span, done.throughput) == (1.25, 6.0, 5 / 6)
    assert done.busy == pytest.approx(4 / 6)
    later = done.since(0.15)
    assert later.requests["batch"].tolist() == [0, 1, 2] and len(later.batches) == 3


def test_a_request_is_not_split() -> None:
    items = [1, 3, 2, 2, 9]
    done = simulate(Arrivals([0.0] * 5, Kinds(items=items)), SECOND, Configuration(4))
    assert sizes(done) == [1, 3, 4]
    assert done.requests["outcome"].tolist() == [ANSWERED] * 4 + [REFUSED]


def test_another_shape_ends_a_batch() -> None:
    load = Arrivals([0.0] * 6, Kinds(shape=[0, 0, 0, 1, 0, 0]))
    assert sizes(simulate(load, FLAT, Configuration(8, fixed_shapes=False))) == [1, 2, 1, 2]
    assert sizes(simulate(load, FLAT, Configuration(8))) == [1, 5]


def test_without_a_batcher_each_request_is_a_call() -> None:
    done = simulate(Arrivals([0.0] * 3), FLAT, Configuration(8, dynamic=False, instances=2))
    assert done.batches["start"].tolist() == [0, 0, 1] and done.batches["instance"].tolist() == [0, 1, 0]


def test_a_delay_ends_where_a_batch_is_full() -> None:
    done = simulate(Arrivals([0.0, 0.1, 0.2]), FLAT, Configuration(2, delay=0.5))
    assert done.batches["start"].tolist() == [0.1, 1.1]
    alone = simulate(Arrivals([0.0]), FLAT, Configuration(2, delay=0.5))
    assert alone.batches["start"].tolist() == [0.5]


def test_the_urgent_go_first() -> None:
    levels = Level(), Level()
    load = Arrivals([0.0, 0.1, 0.2, 0.3], Kinds(level=[1, 1, 1, 0]))
    done = simulate(load, FLAT, Configuration(1, levels=levels))
    assert done.requests["start"].tolist() == [0, 2, 3, 1]


def test_the_expired_are_refused_or_go_last() -> None:
    load = Arrivals([0.0, 0.1, 0.9])
    refused = simulate(load, FLAT, Configuration(1, levels=(Level(timeout=0.5),)))
    assert refused.requests["outcome"].tolist() == [ANSWERED, EXPIRED, ANSWERED]
    # Not at 0.6, but when the batcher looks again.
    assert refused.requests["end"].tolist() == [1, 1, 2]
    last = simulate(load, FLAT, Configuration(1, levels=(Level(timeout=0.5, delayed=True),)))
    assert last.requests["start"].tolist() == [0, 2, 1]


def test_a_full_queue_refuses() -> None:
    done = simulate(Arrivals([0.0, 0.1, 0.2, 0.3]), FLAT, Configuration(1, levels=(Level(size=2),)))
    assert done.requests["outcome"].tolist() == [ANSWERED, ANSWERED, ANSWERED, REFUSED]
    assert done.failed == 0.25


def test_a_batcher_that_looks_too_early_sleeps() -> None:
    """It looks every half second, and when the next request comes; the call ends at 1.2."""
    early, late = (Curve({1: np.array([1.2])}, race=race) for race in (1.0, 0.0))
    queued = Configuration(1, levels=(Level(size=9),))
    assert simulate(Arrivals([0.0, 0.1]), early, queued).batches["start"].tolist() == [0.0, 1.5]
    assert simulate(Arrivals([0.0, 0.1, 1.3]), early, queued).batches["start"][1] == 1.3
    assert simulate(Arrivals([0.0, 0.1]), late, queued).batches["start"].tolist() == [0.0, 1.2]


def test_what_was_scheduled_by_the_delay_misses_who_comes_later() -> None:
    """Quirk of fixed shapes: the second request is scheduled alone at 0.03, and those behind it wake nobody."""
    load = Arrivals([0.0, 0.02, 0.05, 0.06])
    late, early = (Curve({size: np.array([0.1]) for size in (1, 64)}, race=race) for race in (0.0, 1.0))
    configuration = Configuration(8, delay=0.01)
    assert sizes(simulate(load, late, configuration)) == [1, 1, 2]
    assert sizes(simulate(load, early, configuration)) == [1, 3]
    assert sizes(simulate(load, late, Configuration(8, delay=0.01, fixed_shapes=False))) == [1, 3]


def test_a_payload_that_does_not_fit_is_frozen() -> None:
    """The third, of 3 samples, does not fit behind the second; frozen by then, it does not take the fourth."""
    load = Arrivals([0.0, 0.2, 0.25, 2.005], Kinds(items=[1, 2, 3, 1]))
    done = simulate(load, FLAT, Configuration(4, delay=0.01, fixed_shapes=False))
    assert sizes(done) == [1, 2, 3, 1]


def test_a_payload_that_fits_and_has_waited_is_merged() -> None:
    load = Arrivals([0.0, 0.2, 0.25, 1.3], Kinds(items=[1, 2, 3, 1]))
    assert sizes(simulate(load, FLAT, Configuration(4, delay=0.01, fixed_shapes=False))) == [1, 2, 4]


def test_a_batch_of_the_largest_preferred_size_takes_one_more() -> None:
    load = Arrivals([0.0, 0.0, 0.0, 0.001, 0.001, 0.002, 0.003])
    for shape in (None, [0, 0, 0, 0, 0, 0, 0]):
        configuration = Configuration(8, delay=5.0, preferred=(2,), fixed_shapes=shape is None)
        assert sizes(simulate(Arrivals(load.at, Kinds(shape=shape)), FLAT, configuration))[:2] == [2, 3]


def test_clients_without_a_pause_leave_one_ahead_of_the_others() -> None:
    done = simulate(Clients(32, 320), FLAT, Configuration(64))
    assert sizes(done)[:6] == [1, 31, 1, 31, 1, 31]
    assert done.requests.size == 320
    slow = simulate(Clients(2, 4, think=3.0), FLAT, Configuration(1))
    assert slow.requests["arrival"].tolist() == [0, 0, 4, 5]


def test_overheads_are_found_again() -> None:
    times = np.random.default_rng(2).gamma(9.0, 0.001, 200)
    curve = Curve({1: times, 32: times * 2})
    load, configuration = scheduled(250, 20.0), Configuration(32)
    true = Curve(curve.calls, inside=0.0015, outside=0.0030)
    seen = simulate(load, true, configuration, seed=9)
    found = fitted(curve, [Run(load, configuration, seen.batches.size, seen.latencies)])
    assert found.inside == pytest.approx(true.inside, abs=0.0004)
    assert found.outside == pytest.approx(true.outside, abs=0.0008)


def test_what_takes_long_outside_is_found_again_and_holds_at_other_rates() -> None:
    generator = np.random.default_rng(3)
    times = generator.gamma(9.0, 0.001, 200)
    curve, configuration = Curve({1: times, 32: times * 2}), Configuration(32)
    rare = np.where(generator.random(1000) < 0.03, generator.exponential(0.02, 1000), 0.0)
    true = replace(curve, inside=0.001, outside=0.002, spread=rare)
    runs = []
    for number, load in enumerate((scheduled(250, 20.0), scheduled(100, 20.0, seed=4))):
        seen = simulate(load, true, configuration, seed=20 + number)
        runs.append(Run(load, configuration, seen.batches.size, seen.latencies))
    found = fitted(curve, runs)
    for rate in (50, 200, 400):
        load = scheduled(rate, 30.0, seed=7)
        seen, made = (simulate(load, one, configuration, seed=30).latencies for one in (true, found))
        for share in (0.5, 0.9, 0.99):
            assert np.quantile(made, share) == pytest.approx(np.quantile(seen, share), rel=0.15), (rate, share)
    assert (found.beside(500, generator) >= 0).all()
