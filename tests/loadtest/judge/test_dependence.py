"""Whether a comparison knows how little a run says whose requests depend on each other: queues, profiles, stalls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter

from loadtest.judge import baseline, stretches
from loadtest.judge.baseline import Baseline
from loadtest.judge.compare import NONE_SHOWN, NOTHING, UNDECIDED, compare, refusal
from loadtest.record.results import ERROR, OK
from tests.loadtest.judge.test_validity import made

LATENCIES = ("p50", "p90", "p99")


def run(at: Any, latency: Any, seconds: float, verdict: Any = OK, **plan: Any) -> Baseline:
    made_run = made(at, latency, verdict, end={"end": seconds}, duration=seconds, **plan)
    return baseline.of(made_run, Path("r"))


def queue(seed: int, load: float, seconds: float, mean: float = 0.01, drift: float = 0.0) -> Baseline:
    """An M/M/1 queue of `load` for a service of 10 ms; with `drift` it takes so much longer at the end."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.uniform(0, seconds, rng.poisson(load / 0.01 * seconds)))
    took = rng.exponential(mean, len(at)) * (1 + drift * at / seconds)
    work = np.cumsum(took)
    return run(at, work + np.maximum.accumulate(at - (work - took)) - at, seconds)


def ramp(seed: int, slower: float = 1.0) -> Baseline:
    """From nothing to 300 requests a second; the latency is ten times as long at the end."""
    rng = np.random.default_rng(seed)
    at = 30 * np.sqrt(np.sort(rng.random(4500)))
    latency = 0.003 * slower * np.exp(0.1 * rng.normal(size=len(at))) * (1 + 9 * at / 30)
    return run(at, latency, 30.0, profile="ramp:to=300")


def different(a: Baseline, b: Baseline) -> list[bool]:
    metrics = compare([a], [b])["metrics"]
    return [metrics[name]["verdict"] not in (NONE_SHOWN, UNDECIDED) for name in LATENCIES]


@pytest.mark.parametrize(
    ("load", "seconds", "drift"), [(0.8, 30.0, 0.0), (0.9, 30.0, 0.0), (0.95, 60.0, 0.0), (0.8, 30.0, 0.2)]
)
def test_equal_queues_are_seldom_called_different(load: float, seconds: float, drift: float) -> None:
    pairs = [
        (queue(2 * n, load, seconds, drift=drift), queue(2 * n + 1, load, seconds, drift=drift)) for n in range(20)
    ]
    shown = float(np.mean([different(*pair) for pair in pairs]))
    print(f"load {load}, {seconds:g} s, drift {drift}: {shown:.1%} of equal runs called different")
    assert shown <= 0.1


def test_equal_ramps_are_seldom_called_different_and_a_slower_one_is_found() -> None:
    assert np.mean([different(ramp(2 * n), ramp(2 * n + 1)) for n in range(8)]) <= 0.1
    for seed in range(8):
        values = compare([ramp(2 * seed)], [ramp(2 * seed + 1, slower=1.25)], allow=0.05)
        assert not values["passed"]
        assert values["metrics"]["p50"]["verdict"] == "slower"
        assert values["metrics"]["p50"]["low"] < 1.25 < values["metrics"]["p50"]["high"]
        # The slowest tenth all lies in the last stretches: that may be called too little to know, not no difference.
        assert values["metrics"]["p90"]["verdict"] != NONE_SHOWN


def test_a_difference_between_queues_that_run_long_enough_is_found() -> None:
    for n in range(3):
        metrics = compare([queue(n, 0.5, 120.0)], [queue(50 + n, 0.5, 120.0, mean=0.014)])["metrics"]
        assert metrics["p50"]["verdict"] == metrics["p90"]["verdict"] == "slower"


def test_a_throughput_that_falls_counts() -> None:
    steady = run(np.arange(3000) / 500, 0.002, 6.0, concurrency=4)
    standing = run(np.arange(500) / 500, 0.002, 6.0, concurrency=4)
    values = compare([steady], [standing], allow=0.05)
    throughput = values["metrics"]["throughput"]
    assert (throughput["a"], throughput["b"]) == (pytest.approx(500, rel=0.01), pytest.approx(83.3, rel=0.01))
    assert not throughput["passed"]
    assert values["metrics"]["errors"]["passed"]
    assert compare([steady], [steady], allow=0.05)["passed"]


def test_nothing_to_compare_is_not_no_difference() -> None:
    good, bad = run(np.arange(3000) / 100, 0.005, 30.0), run(np.arange(3000) / 100, 0.005, 30.0, ERROR)
    for sides in ((good, bad), (bad, good), (bad, bad)):
        values = compare([sides[0]], [sides[1]])
        for name in ("throughput", *LATENCIES):
            assert values["metrics"][name]["verdict"] == NOTHING
        assert not values["passed"]
        assert refusal(values)
        values["a"][0]["valid"] = values["b"][0]["valid"] = True  # were it not for its failures
        assert "nothing to compare" in str(refusal(values))


def test_a_single_error_is_no_finding() -> None:
    at = np.arange(3000) / 100
    one = np.where(np.arange(3000) == 7, ERROR, OK)
    values = compare([run(at, 0.005, 30.0)], [run(at, 0.005, 30.0, one)], allow=0.05)
    assert values["metrics"]["errors"]["passed"]


def test_the_memory_of_a_series() -> None:
    rng = np.random.default_rng(0)
    assert stretches.memory(np.ones(60)) == 1.0
    assert np.mean([stretches.memory(rng.normal(size=600)) for _ in range(50)]) == pytest.approx(1.0, abs=0.2)
    # AR(1) with 0.8 remembers (1 + 0.8) / (1 - 0.8) = 9 elements.
    series = lfilter([1.0], [1.0, -0.8], rng.normal(size=(50, 3000)))
    assert np.mean([stretches.memory(one) for one in series]) == pytest.approx(9, rel=0.2)


def alone(series: Any) -> stretches.Cut:
    return stretches.cut(series, stretches.memory(series))


def test_a_short_series_remembers_longer_than_it_shows() -> None:
    """AR(1) with 0.6 remembers (1 + 0.6) / (1 - 0.6) = 4 elements; sixty of them show 2.8."""
    rng = np.random.default_rng(0)
    series = lfilter([1.0], [1.0, -0.6], rng.normal(size=(400, 160)))[:, 100:]
    assert np.mean([stretches.memory(one) for one in series]) == pytest.approx(4, rel=0.1)


def test_what_is_too_short_or_one_moment_is_not_trusted() -> None:
    assert "too short" in alone(np.repeat([0.0, 1.0], 30)).why
    moments = np.zeros(60)
    moments[[5, 40]] = 9.0, -9.0
    assert "one or two moments" in alone(moments).why
    even = alone(np.random.default_rng(1).normal(size=60))
    assert not even.why
    assert even.place.max() == stretches.MOST - 1


def test_runs_cut_into_other_numbers_of_stretches_can_be_compared() -> None:
    new = queue(0, 0.5, 30.0)
    old = baseline.joined(new, np.arange(60) * 30 // 60)
    values = compare([old], [new])["metrics"]
    assert {one["verdict"] for one in values.values()} == {NONE_SHOWN}
    assert all(one["effect"] == pytest.approx(0.0 if name == "errors" else 1.0) for name, one in values.items())
