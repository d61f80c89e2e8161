import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.judge import trend
from loadtest.load.memory import Memory
from loadtest.scenario import judges
from loadtest.scenario.judges import Played

RNG = np.random.default_rng(0)
SECONDS = 600.0


def written(path: Path, at: Any, latency: Any, *, closed: bool = False, verdict: Any = "ok") -> Played:
    """Return a phase whose requests were due at `at`, took `latency` seconds and ended in `verdict`."""
    plan = {"duration": SECONDS, "concurrency": 1 if closed else None, "rate": None if closed else 10.0}
    rows: list[dict[str, Any]] = [{"format": 1, "plan": plan, "model": "m", "url": "u"}]
    ended = np.broadcast_to(verdict, len(at)).tolist()
    for n, (start, seconds, word) in enumerate(zip(at, latency, ended, strict=True)):
        rows.append({"n": n, "planned": start, "sent": start, "done": start + seconds, "verdict": word, "payload": 0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + json.dumps({"end": SECONDS}) + "\n")
    return Played("soak", {"plan": plan}, path)


def soaked(path: Path, at: Any, latency: Any, memory: Memory | None = None, **more: Any) -> dict[str, bool | None]:
    return {one.name: one.passed for one in judges.soak([written(path, at, latency, **more)], memory or Memory(""))}


def noise(count: int, share: float = 0.2) -> Any:
    return 1 + share * RNG.standard_normal(count).clip(-3, 3)


def test_a_steady_soak_shows_nothing(tmp_path: Path) -> None:
    at = np.sort(RNG.uniform(0, SECONDS, 6000))
    found = soaked(tmp_path / "r", at, 0.02 * noise(6000), Memory("p", np.arange(600.0), 1e9 * noise(600, 0.01)))
    assert found == {"leak": True, "drift": True, "throttling": True}


def test_latency_that_climbs_is_drift(tmp_path: Path) -> None:
    at = np.sort(RNG.uniform(0, SECONDS, 6000))
    assert soaked(tmp_path / "r", at, 0.02 * noise(6000) * (1 + at / SECONDS))["drift"] is False
    # Five per cent are shown, but too little to matter.
    assert soaked(tmp_path / "s", at, 0.02 * noise(6000, 0.01) * (1 + 0.05 * at / SECONDS))["drift"] is True


@pytest.mark.parametrize("closed", [False, True])
def test_a_server_that_slows_down_at_once_is_throttling(tmp_path: Path, closed: bool) -> None:
    gaps = np.where(np.arange(6000) < 3600, 0.08, 0.14)
    at = np.cumsum(gaps) - 0.08
    at, gaps = at[at < SECONDS], gaps[at < SECONDS]
    found = soaked(tmp_path / "r", at, gaps * 0.9 * noise(len(at), 0.05), closed=closed)
    assert found["throttling"] is False


def test_memory_that_grows_is_a_leak_and_a_pool_that_fills_is_none(tmp_path: Path) -> None:
    at, seconds = np.sort(RNG.uniform(0, SECONDS, 3000)), np.arange(600.0)
    for used, passed in (
        (1e9 * (1 + seconds / 2000), False),
        (1e9 * (1.5 - 0.5 * np.exp(-seconds / 60)), True),
        (np.full(600, 1e9), True),
    ):
        memory = Memory("p", seconds, used + 1e6 * RNG.standard_normal(600) * (used.std() > 0))
        assert soaked(tmp_path / "r", at, 0.02 * noise(3000), memory)["leak"] is passed


def test_a_short_soak_is_not_judged(tmp_path: Path) -> None:
    memory = Memory("p", np.arange(3.0), np.full(3, 1e9))
    assert set(soaked(tmp_path / "r", np.arange(30.0), np.full(30, 0.01), memory).values()) == {None}
    assert soaked(tmp_path / "r", np.arange(30.0), np.full(30, 0.01))["leak"] is None


def test_a_ramp_finds_where_latency_begins_to_climb(tmp_path: Path) -> None:
    at = np.sqrt(np.linspace(0, SECONDS**2, 6000))[:-1]  # the rate grows evenly, to 20 a second
    latency = 0.02 * noise(len(at)) * np.where(at < 400, 1, 3)
    (found,) = judges.climb([written(tmp_path / "r", at, latency)], Memory(""))
    assert found.figures["rate"] == pytest.approx(6000 / SECONDS * 2 * 400 / SECONDS, rel=0.1)
    (found,) = judges.climb([written(tmp_path / "s", at, 0.02 * noise(len(at)))], Memory(""))
    assert "no climb" in found.text


@pytest.mark.parametrize("verdict", ["error", "timeout"])
def test_nothing_answered_is_no_pass(tmp_path: Path, verdict: str) -> None:
    at = np.sqrt(np.linspace(0, SECONDS**2, 6000))[:-1]
    phase = written(tmp_path / "r", at, np.full(len(at), 0.02), verdict=verdict)
    assert [one.passed for one in judges.climb([phase], Memory(""))] == [False]
    assert {one.passed for one in judges.soak([phase], Memory(""))} == {None}
    assert [one.passed for one in judges.batch_sweep(phases([0, 0]), Memory(""))] == [False]
    assert [one.passed for one in judges.saturation(phases([0, 0, 0, 0]), Memory(""))] == [None]


@pytest.mark.parametrize("verdict", ["error", "timeout"])
def test_failures_are_where_a_ramp_climbs(tmp_path: Path, verdict: str) -> None:
    """A server that refuses at once what is too much for it is as fast as ever."""
    at = np.sqrt(np.linspace(0, SECONDS**2, 6000))[:-1]
    phase = written(tmp_path / "r", at, np.full(len(at), 0.02), verdict=np.where(at < 400, "ok", verdict))
    (found,) = judges.climb([phase], Memory(""))
    assert found.figures["rate"] == pytest.approx(6000 / SECONDS * 2 * 400 / SECONDS, rel=0.1)


def test_false_alarms_are_rare(tmp_path: Path) -> None:
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        at = np.sort(rng.uniform(0, SECONDS, 1200))
        # Latency that wanders: neighbouring requests are alike.
        wander = np.exp(0.1 * np.convolve(rng.standard_normal(1200 + 49), np.ones(50) / 50**0.5, "valid"))
        found = soaked(tmp_path / "r", at, 0.02 * wander)
        alarms += found["drift"] is False or found["throttling"] is False
    assert alarms <= 1


def phases(rates: list[float], key: str = "concurrency") -> list[Played]:
    return [
        Played(
            str(n),
            {
                "plan": {"concurrency": 2**n},
                "parts": [{"batch": 2**n}],
                "rate": {"achieved": rate, "samples": rate * 2**n},
                "latency_ms": {"p50": 1.0, "p99": 2.0},
            },
            Path(),
        )
        for n, rate in enumerate(rates)
    ]


def test_the_knee_is_the_lowest_concurrency_of_full_throughput() -> None:
    played = phases([100, 195, 380, 400, 402, 399])
    (finding,) = judges.saturation(played, Memory(""))
    assert finding.figures["concurrency"] == 8
    assert finding.passed
    assert [judges.saturated(played[:n]) for n in range(1, 7)] == [False, False, False, False, False, True]


def test_throughput_that_still_rises_has_no_knee_yet() -> None:
    (finding,) = judges.saturation(phases([100, 200, 400, 800]), Memory(""))
    assert finding.passed is None
    assert "not reached" in finding.text


def test_the_best_batch_is_that_of_most_samples() -> None:
    (finding,) = judges.batch_sweep(phases([100, 90, 60, 20]), Memory(""))
    assert finding.figures["best"] == 4
    assert [row["batch"] for row in finding.figures["batches"]] == [1, 2, 4, 8]


@pytest.mark.parametrize(("after", "back"), [(1.2, True), (3.0, False)])
def test_recovery_compares_the_last_phase_with_the_first(after: float, back: bool) -> None:
    played = phases([1, 1, 1])
    played[-1].document["latency_ms"]["p50"] = after
    assert judges.recovery(played, Memory(""))[0].passed is back


def spiked(folder: Path, slow: float, rest: float = 0.02) -> Any:
    """A phase of 100 s whose overload ends at 40 s: slow for `slow` more seconds, then as `rest` says."""
    at = np.arange(0, 100, 0.02)
    latency = np.where((at >= 30) & (at < 40 + slow), 1.0, rest) * noise(len(at))
    phase = written(folder / "spike", at, latency)
    plan = {"duration": 100.0, "rate": 50.0, "profile": "spike:to=150,start=0.3,length=0.1", "concurrency": None}
    document = {"plan": plan, "latency_ms": {"p50": 20.0}}
    around = Played("around", {"plan": plan | {"profile": "flat"}, "latency_ms": {"p50": 20.0}}, Path())
    (plain, backlog) = judges.recovery([around, Played("spike", document, phase.path), around], Memory(""))
    assert plain.passed
    return backlog


def test_recovery_counts_from_the_end_of_the_overload(tmp_path: Path) -> None:
    for slow in (0.0, 5.0, 30.0):
        backlog = spiked(tmp_path, slow)
        assert backlog.passed
        assert backlog.figures["seconds"] == pytest.approx(slow, abs=2.0)


def test_a_backlog_that_lasts_to_the_end_of_its_phase_is_damage_though_the_next_one_is_well(tmp_path: Path) -> None:
    backlog = spiked(tmp_path, 60.0)
    assert backlog.passed is False
    assert "BACKLOG STAYS" in backlog.text
    assert spiked(tmp_path, 0.0, rest=0.05).passed is False


def test_a_line_and_a_jump_are_found() -> None:
    at = np.arange(50.0)
    found = trend.line(at, 100 + at)
    assert found.change == pytest.approx(49 / 124.5)
    assert found.p < 1e-6
    step = trend.jump(np.where(np.arange(50) < 20, 10.0, 5.0) + 0.01 * np.sin(np.arange(50)))
    assert abs(step.at - 20) < 3
    assert step.ratio == pytest.approx(0.5, rel=0.01)
    assert step.p < 1e-3
    assert trend.line(at, np.full(50, 3.0)).p == 1.0
