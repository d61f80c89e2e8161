"""What is called sound of an invalid run lies where a punctual client would have seen it, and nothing else is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadtest.judge import sound, summary
from loadtest.record.results import TIMEOUT
from loadtest.record.statistics import PERCENTILES, percentile
from tests.loadtest.judge.test_validity import made

Numbers = Any
COUNT = 6000


def answered(arrived: Numbers, service: Numbers, servers: int = 1) -> Numbers:
    """Return when a server is done with requests that it begins in the order in which they arrive.

    Requests are alike: a service time belongs to a place in the server's line, whoever comes to have it.
    """
    free, done = np.zeros(servers), np.empty(len(arrived))
    for at, needed in zip(np.argsort(arrived, kind="stable"), service, strict=True):
        place = int(free.argmin())
        done[at] = free[place] = max(arrived[at], free[place]) + needed
    return done


def stalls(planned: Numbers, every: float, seconds: float) -> Numbers:
    """Return how late requests leave of a client that stands still so long, so often: until it goes on."""
    into = planned % every
    return np.where((planned > every) & (into < seconds), seconds - into, 0.0)


def one_of_two_workers(planned: Numbers, rng: np.random.Generator) -> Numbers:
    """Every second request is sent by a worker that stands still from time to time, so that others overtake them."""
    return np.where(np.arange(len(planned)) % 2 == 0, stalls(planned, 4.0, 0.2), 0.0)


LAGS: dict[str, Callable[[Numbers, np.random.Generator], Numbers]] = {
    "short stalls": lambda planned, rng: stalls(planned, 2.0, 0.05),
    "one long stall": lambda planned, rng: stalls(planned, 20.0, 0.9),
    "often": lambda planned, rng: stalls(planned, 0.1, 0.02),
    "always a little": lambda planned, rng: rng.exponential(4e-4, len(planned)),
    "one of two workers": one_of_two_workers,
}
USE = {"idle": (0.1, 1), "half": (0.5, 1), "busy": (0.85, 1), "three instances": (0.6, 3)}


@pytest.mark.parametrize("use", USE)
@pytest.mark.parametrize("kind", LAGS)
def test_what_a_punctual_client_would_have_seen_lies_between_the_ends(kind: str, use: str) -> None:
    share, servers = USE[use]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        planned = np.cumsum(rng.exponential(0.01, COUNT))
        service = rng.gamma(4.0, 0.01 * share * servers / 4.0, COUNT)
        truth = (answered(planned, service, servers) - planned) * 1e3
        sent = planned + LAGS[kind](planned, rng)
        done = answered(sent, service, servers)
        run = made(planned, done - sent, lag=sent - planned, duration=float(planned[-1]), end={"end": done.max()})
        for key, (low, high) in sound.bounds(run, {}).items():
            true = percentile(truth, PERCENTILES[key])
            assert low <= true * (1 + 1e-9), (key, seed)
            assert true <= high * (1 + 1e-9), (key, seed)


def late(share: float, rate: float = 100.0, service: float = 0.004) -> tuple[dict[str, Any], Numbers]:
    """A run whose client stood still for 40 ms at a time, so much of the time; its document, and the truth in ms."""
    rng = np.random.default_rng(0)
    planned = np.arange(COUNT) / rate
    times = rng.gamma(9.0, service / 9.0, COUNT)
    sent = planned + stalls(planned, 0.04 / share, 0.04)
    true, done = answered(planned, times) - planned, answered(sent, times)
    run = made(planned, done - sent, lag=sent - planned, rate=rate, duration=COUNT / rate, end={"end": COUNT / rate})
    return summary.summary(run), true * 1e3


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.02, {"p50", "p90"}), (0.03, {"p50"}), (0.5, set())],
)
def test_sound_is_what_the_lateness_does_not_matter_for_and_nothing_else(share: float, expected: set[str]) -> None:
    document, true = late(share)
    assert not document["valid"]
    said = document["sound"]
    assert set(said["latency_ms"]) >= expected
    for key, percent in PERCENTILES.items():
        measured, truth = document["latency_ms"][key], percentile(true, percent)
        if key in said["latency_ms"]:
            low, high = said["latency_ms"][key]
            assert low <= truth <= high <= low / (1 - sound.WIDEST) * (1 + 1e-9)
            assert abs(measured / truth - 1) <= sound.WIDEST / (1 - sound.WIDEST)
        if measured > 1.2 * truth:
            assert key not in said["latency_ms"], key
        assert truth <= said["at_most_ms"][key]
    assert document["latency_ms"]["p999"] > 2 * percentile(true, 99.9), "the client's lateness was of no matter"
    assert set(said["latency_ms"]) <= {"p50", "p90", "p95"}


def test_lateness_in_reading_widens_every_percentile() -> None:
    rng = np.random.default_rng(1)
    true = rng.gamma(9.0, 1e-3, COUNT)
    read = np.where(rng.random(COUNT) < 0.02, 0.5, 0.0)
    lags = {"p99": 500.0, "p999": 500.0, "max": 500.0}
    run = made(np.arange(COUNT) / 100, true + read, duration=60.0, end={"end": 60.0, "loop_lag_ms": lags})
    document = summary.summary(run)
    assert "the client was late itself" in document["why"]
    assert document["sound"]["latency_ms"] == {}
    # Where no more than one answer of a thousand was taken in late, the ninety-ninth percentile is the server's.
    read = np.where(rng.random(COUNT) < 0.0005, 0.5, 0.0)
    found = sound.bounds(made(np.arange(COUNT) / 100, true + read), {"p99": 0.1, "p999": 0.2, "max": 500.0})
    for key in ("p50", "p90", "p95"):
        low, high = found[key]
        assert low <= percentile(true, PERCENTILES[key]) * 1e3 <= high < 1.1 * low


def test_a_request_without_an_answer_is_neither_quick_nor_slow() -> None:
    at = np.arange(COUNT) / 100
    verdict = np.where(np.arange(COUNT) % 50 == 0, TIMEOUT, "ok")
    found = sound.bounds(made(at, 0.005, verdict), {})
    assert found["p50"] == pytest.approx([5.0, 5.0])
    assert found["p99"][1] == float("inf")
    assert "max" not in found


def test_a_valid_run_and_one_that_the_server_spoilt_have_no_sound_part() -> None:
    good = summary.summary(made(np.arange(COUNT) / 100, 0.004, duration=60.0, end={"end": 60.0}))
    assert good["valid"] and good["sound"] is None
    failed = np.where(np.arange(COUNT) % 10 == 0, "error", "ok")
    bad = summary.summary(made(np.arange(COUNT) / 100, 0.004, failed, duration=60.0, end={"end": 60.0}))
    assert not bad["valid"] and bad["sound"]["latency_ms"] == bad["sound"]["at_most_ms"] == {}
    assert bad["sound"]["how"] == []


def test_the_rate_that_was_held_is_one_at_which_the_client_was_punctual() -> None:
    """200 requests a second are sent in time, 400 are not: from second 10 on, every request is later than the last."""
    planned = np.concatenate([np.arange(2000) / 200, 10 + np.arange(4000) / 400])
    lag = np.where(planned < 10, 0.0, (planned - 10) * 0.5)
    document = summary.summary(made(planned, 0.002, lag=lag, rate=300.0, duration=20.0, end={"end": 25.0}))
    said = document["sound"]
    assert said["punctual"] == {"seconds": 10, "of": 20, "rate": 200.0}
    assert any("punctual in 10 of 20 seconds, at up to 200 requests/s" in line for line in said["text"])
    assert said["how"][0].startswith("--rate 160")


def test_a_client_that_used_up_its_core_is_told_to_take_more_workers() -> None:
    busy = made(np.arange(COUNT) / 100, 0.004, concurrency=8, duration=60.0, end={"end": 60.0, "client_cpu": 0.95})
    document = summary.summary(busy)
    assert "the client was the limit" in document["why"]
    assert document["sound"]["how"][0].startswith("--workers 2")
    assert any("the server answered 100 requests/s at least" in line for line in document["sound"]["text"])
    # What it waited for was there: it only cost the client more than it should.
    low, high = document["sound"]["latency_ms"]["p99"]
    assert 3.4 < low < high == pytest.approx(4.0)
