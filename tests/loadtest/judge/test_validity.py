"""What must not pass: a failing server, a standing one, a client that is late, a percentile of too few requests."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from loadtest.calls import scenario as scenarios
from loadtest.judge import summary, thresholds
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record import statistics
from loadtest.record.results import DROPPED, ERROR, OK, TIMEOUT, VERDICTS, Results
from loadtest.report import exports, page
from loadtest.scenario import judges, play, scenario
from loadtest.selftest import nullserver
from tests.loadtest.program import loadtest

QUIET = {"p99": 0.1, "p999": 0.2, "max": 0.5}


def made(
    at: Any, latency: Any, verdict: Any = OK, lag: Any = 0.0, end: dict[str, Any] | None = None, **plan: Any
) -> Results:
    """A run in memory: requests due at `at` that left `lag` late and took `latency` seconds from then on."""
    at, count = np.asarray(at, float), len(at)
    load = {} if "concurrency" in plan else {"rate": 100.0}
    written = asdict(Plan("grpc://h:1", **{"duration": 30.0} | load | plan))
    part = {"model": "m", "version": "1", "payloads": 1, "batch": 1, "tolerance": None, "weight": 1.0, "shapes": {}}
    header = {"plan": written, "parts": [part], "model": "m", "model_version": "1", "url": "grpc://h:1"}
    ended = {"end": 30.0, "client_cpu": 0.2, "client_cores": 1, "gone": False, "errors": [], "loop_lag_ms": QUIET} | (
        end or {}
    )
    codes = np.vectorize(VERDICTS.index, otypes=[np.int8])(np.broadcast_to(verdict, count))
    sent = np.where(codes == VERDICTS.index(DROPPED), np.nan, at + lag)
    if "concurrency" in plan:
        at = sent
    nothing = np.zeros(count, np.int32)
    return Results(header, ended, at, sent, sent + latency, codes, nothing, nothing + 1, nothing, [""], [])


def judged(run: Results, *sentences: str) -> list[bool]:
    return [one["passed"] for one in summary.summary(run, sentences)["thresholds"]]


@pytest.mark.parametrize(("rate", "allowed"), [(1.0, 10.0), (5.0, 2.0), (100.0, 1.0)])
def test_how_late_a_request_may_leave_where_they_are_far_apart(rate: float, allowed: float) -> None:
    at = np.arange(int(rate * 3)) / rate
    for lag, late in ((0.9 * allowed, False), (1.2 * allowed, True)):
        run = made(at, 5e-4, lag=lag / 1e3, rate=rate, duration=3.0, end={"end": 3.0})
        assert summary.summary(run)["why"].startswith("requests left late") is late


EVERY_10_MS = np.arange(3000) / 100


@pytest.mark.parametrize("bad", [ERROR, TIMEOUT])
@pytest.mark.parametrize(("failed", "valid"), [(30, True), (31, False), (2999, False)])
def test_more_than_one_in_a_hundred_failures_make_a_run_invalid(bad: str, failed: int, valid: bool) -> None:
    run = made(EVERY_10_MS, 0.005, np.where(np.arange(3000) < failed, bad, OK))
    document = summary.summary(run, ["p50 < 50ms"])
    assert document["valid"] == valid
    assert [one["passed"] for one in document["thresholds"]] == [valid]
    assert valid or f"{failed:,} of 3,000 requests failed" in document["why"]


def test_whoever_says_how_many_may_fail_is_taken_at_their_word() -> None:
    run = made(EVERY_10_MS, 0.005, np.where(np.arange(3000) % 10 == 0, ERROR, OK))
    assert not summary.summary(run)["valid"]
    assert judged(run, "p50 < 50ms, errors < 20%") == [True, True]
    assert judged(run, "p50 < 50ms, errors < 5%") == [True, False]
    # The file keeps it, so that a report, a comparison or a baseline of the run says the same.
    run.header["plan"]["thresholds"] = ["errors < 20%"]
    assert summary.summary(run)["valid"]
    assert not summary.summary(run, ["p50 < 50ms"])["valid"]


def test_a_failed_request_is_slower_than_any() -> None:
    for bad in (ERROR, TIMEOUT, DROPPED):
        run = made(EVERY_10_MS, 0.001, np.where(np.arange(3000) < 60, bad, OK), end={"loop_lag_ms": {}})
        run.planned[:60] = 29.9999  # a dropped one was due as the run ended, so that nothing was late
        allowed = "errors <= 5%"
        assert judged(run, "p95 < 5ms, p99 < 5ms, max < 9999s", allowed) == [True, False, False, True], bad
        measured = summary.summary(run, ["p99 < 5ms", allowed])["thresholds"][0]
        assert measured["measured"] == float("inf")
        assert "failed requests" in thresholds.line(measured)


def test_a_percentile_of_too_few_requests_is_undecided_and_says_how_long_to_run() -> None:
    for name, needed in (("p50", 5), ("p90", 29), ("p95", 59), ("p99", 299), ("p99.9", 2995)):
        for count, passed in ((needed - 1, False), (needed, True)):
            run = made(np.arange(count) / 100, 0.005, duration=count / 100)
            [verdict] = summary.summary(run, [f"{name} < 50ms"])["thresholds"]
            assert verdict["passed"] == passed, (name, count)
            assert verdict["undecided"] != passed
    [verdict] = summary.summary(made(np.arange(100) / 10, 0.005, duration=10.0), ["p99 < 50ms"])["thresholds"]
    assert "100 requests are too few, 299 are needed; run for 30 s" in thresholds.line(verdict)
    assert "undecided" in str(thresholds.refusal([verdict]))
    # What is not true is no matter of the count.
    assert thresholds.line(summary.summary(made([0.0], 0.005), ["p99 < 1ms"])["thresholds"][0]).startswith("FAILED")


def test_so_many_requests_show_a_percentile_in_nineteen_of_twenty_runs() -> None:
    """Where more than 1 % of the requests are too slow, a run of `needed` requests that shows none is rare."""
    rng, count = np.random.default_rng(0), statistics.needed(99)
    shown = [(rng.random(count) < 0.01).any() for _ in range(2000)]
    assert np.mean(shown) > 0.94
    assert np.mean([(rng.random(count // 2) < 0.01).any() for _ in range(2000)]) < 0.85


def test_a_percentile_that_is_the_maximum_is_called_so() -> None:
    assert not any("largest" in note for note in summary.summary(made(np.arange(1000) / 100, 0.005))["notes"])
    assert any("p99.9 of so few" in note for note in summary.summary(made(np.arange(999) / 100, 0.005))["notes"])
    assert any("p99 and p99.9" in note for note in summary.summary(made(np.arange(99) / 100, 0.005))["notes"])


def standing(seconds: float, users: int = 4, service: float = 0.002, duration: float = 6.0) -> Results:
    """A closed loop whose server stands still from second 1 on, for some seconds or to the end."""
    stall_end = min(1.0 + seconds, duration + 1.0)
    before = np.arange(0, 1.0, service)
    after = np.arange(stall_end, duration, service)
    at = np.concatenate([before, after])
    latency = np.full(len(at), service)
    latency[len(before) - 1] += stall_end - 1.0
    order = np.argsort(np.tile(at, users), kind="stable")
    return made(np.tile(at, users)[order], np.tile(latency, users)[order], concurrency=users, duration=duration)


def test_a_server_that_stands_still_under_a_closed_loop_fails() -> None:
    document = summary.summary(standing(9.0), ["p99 < 20ms, errors < 1%"])
    assert document["longest_gap"]["seconds"] == pytest.approx(5.0, abs=0.01)
    assert document["longest_gap"]["at"] == pytest.approx(1.0, abs=0.01)
    assert not document["valid"]
    assert "stood still: no answer for 5.0 s" in document["why"]
    assert [one["passed"] for one in document["thresholds"]] == [False, False]
    assert summary.summary(standing(0.0), ["p99 < 20ms"])["thresholds"][0]["passed"]


def test_a_short_stall_fails_the_percentile_that_an_open_loop_would_have_seen() -> None:
    """0.9 of 6 s: 15 % of what would have been due waited, but only 4 requests of 10,000 were sent meanwhile."""
    document = summary.summary(standing(0.9), ["p99 < 20ms", "service p99 < 20ms"])
    assert document["valid"]
    assert document["latency_ms"]["p99"] == pytest.approx(2.0)
    assert document["corrected_ms"]["p99"] > 700
    assert document["corrected_ms"]["p50"] == pytest.approx(2.0)
    assert [one["passed"] for one in document["thresholds"]] == [False, True]


def test_the_correction_is_that_of_hdrhistogram() -> None:
    """One user, 9 requests of 1 s and one of 11: the mean is 2 s, so the slow one stands for 9, 7, 5 and 3 s too."""
    latency = np.array([1.0] * 9 + [11.0])
    run = made(np.cumsum(latency) - latency, latency, concurrency=1)
    assert sorted(summary.corrected(run)) == [*[1.0] * 9, 3.0, 5.0, 7.0, 9.0, 11.0]
    assert summary.summary(made(EVERY_10_MS, 0.005))["corrected_ms"] is None
    # A user who thinks plans to.
    thinking = made(np.arange(10) * 2.0, [1.0] * 9 + [4.0], concurrency=1, think=1.0)
    assert sorted(summary.corrected(thinking)) == [*[1.0] * 9, 4.0]


@pytest.mark.parametrize("bad", [ERROR, TIMEOUT])
def test_the_whole_series_of_a_failed_request_is_slower_than_any(bad: str) -> None:
    """985 answers in 10 ms and 15 failures after 0.9 s, each of which stands for 37 more."""
    failed = np.arange(1000) % 66 == 65
    latency = np.where(failed, 0.9, 0.01)
    run = made(np.cumsum(latency) - latency, latency, np.where(failed, bad, OK), concurrency=1, duration=23.0)
    assert failed.sum() == 15
    document = summary.summary(run, ["p99 < 1500ms, p90 < 1500ms, p50 < 20ms, errors < 5%"])
    assert document["valid"]
    assert [one["passed"] for one in document["thresholds"]] == [False, False, True, True]
    assert document["thresholds"][0]["measured"] == float("inf")
    assert document["corrected_ms"]["max"] == pytest.approx(900 if bad == TIMEOUT else 10)


def test_slow_and_thinking_users_are_no_stall() -> None:
    slow = made(np.arange(6) * 5.0, 4.9, concurrency=1)
    assert summary.summary(slow)["valid"]
    assert summary.summary(made(np.arange(6) * 5.0, 0.01, concurrency=1, think=4.9))["valid"]
    assert not summary.summary(made([0.0, 0.1, 0.2, 0.3, 25.0], 0.01, concurrency=1))["valid"]


def test_nine_in_a_thousand_that_left_late_spoil_the_percentile_that_sees_them() -> None:
    lag = np.where((np.arange(3000) >= 1500) & (np.arange(3000) < 1527), 0.25, 0.0)
    run = made(EVERY_10_MS, 0.005, lag=lag)
    assert judged(run, "p99 < 20ms") == [True]
    for sentence in ("p99.9 < 1s", "max < 1s"):
        document = summary.summary(run, ["p99 < 20ms", sentence])
        assert not document["valid"]
        assert "the client was late itself" in document["why"] and document["fault"] == "client"
        assert [one["passed"] for one in document["thresholds"]] == [False, False]


@pytest.mark.parametrize("plan", [{"concurrency": 2}, {"rate": 100.0}])
def test_an_event_loop_that_was_kept_waiting_makes_both_kinds_of_loop_invalid(plan: dict[str, Any]) -> None:
    for late, valid in ((5.0, True), (8.0, False)):
        run = made(EVERY_10_MS, 0.010, end={"loop_lag_ms": {"p99": late, "p999": 50.0, "max": 90.0}}, **plan)
        assert summary.summary(run)["valid"] == valid
    assert not summary.summary(run, ["p99.9 < 1s"])["valid"]
    # Against an answer that takes a second, six milliseconds are nothing.
    assert summary.summary(made(EVERY_10_MS, 1.0, end={"loop_lag_ms": {"p99": 6.0}}, **plan))["valid"]


def test_a_server_that_refuses_nearly_everything_exits_3(stand_in: Any, tmp_path: Path) -> None:
    options = ("--duration", "1s", "--warmup", "0s", "--concurrency", "4", "--output", tmp_path / "r.jsonl")
    with stand_in(refuse=(503, grpc.StatusCode.UNAVAILABLE, "too busy"), since=20) as server:
        done = loadtest("run", "double", "--url", server.http, *options, "--threshold", "p99 < 50ms")
        assert done.returncode == 3, done.stdout
        assert "requests failed" in done.stdout
        assert "passed: p99" not in done.stdout
    again = loadtest("report", tmp_path / "r.jsonl", "--threshold", "p99 < 50ms, errors < 100%")
    assert again.returncode == 3
    assert "FAILED: p99 < 50ms" in again.stdout


def test_the_client_is_judged_while_it_sends_not_while_it_waits(tmp_path: Path) -> None:
    """One answer that comes seconds after the last request must not make the client look idle."""
    shares = []
    for name, staged in (("even", {}), ("drain", {"stall": 2.0, "each": 1000, "instances": 64})):
        with nullserver.running(**staged) as server:
            plan = Plan(server.http, concurrency=8, duration=0.5, warmup=0.0)
            drive.run(plan, [Part(server.model, payload.generate(nullserver.INPUTS, 4, 0))], tmp_path / name)
        document = summary.summarize(tmp_path / name)
        shares.append(document["client_cpu"])
        assert set(document["loop_lag_ms"]) == {"p99", "p999", "max"}
    assert json.loads((tmp_path / "drain").read_text().splitlines()[-1])["end"] > 1.5
    assert shares[1] > 0.5 * shares[0]


def test_every_report_of_a_run_says_what_did_not_pass(tmp_path: Path) -> None:
    """JUnit, the GitHub summary, Prometheus and the page, of an undecided sentence and of a failed one."""
    run = made(np.arange(100) / 10, 0.005, duration=10.0, concurrency=2)
    values = summary.summary(run, ["p99 < 50ms", "max < 1ms"])
    assert [thresholds.word(one) for one in values["thresholds"]] == ["UNDECIDED", "FAILED"]
    for name in ("junit", "summary", "prometheus"):
        exports.WHOLE[name](run, values, tmp_path / name)
    junit = (tmp_path / "junit").read_text()
    assert 'tests="3" failures="2"' in junit
    assert "UNDECIDED: p99 &lt; 50ms" in junit
    markdown = (tmp_path / "summary").read_text()
    assert markdown.startswith("### ❌ valid run")
    assert "❌ 100 requests are too few, 299 are needed" in markdown
    assert "| corrected |" in markdown
    assert 'loadtest_threshold_passed{model="m",threshold="p99 < 50ms"} 0.0' in (tmp_path / "prometheus").read_text()
    page.write_loaded(run, values, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "UNDECIDED: 100 requests are too few" in html
    assert "corrected: as if requests had been due" in html
    assert "from the planned time" not in html[html.index("</head>") :]


def test_a_scenario_that_is_not_judged_in_full_is_not_passed(tmp_path: Path) -> None:
    """A knee that was not reached is no pass; memory that nobody asked to watch is no failure."""
    played = [judges.Played("a", summary.summary(made(EVERY_10_MS, 0.005)) | {"thresholds": []}, tmp_path / "a")]
    found = scenario.load(scenario.find("saturation"))
    for optional, passed in ((False, None), (True, True)):
        finding = judges.Finding("knee", None, "not reached", optional=optional)
        assert play._document(found, "saturation", played, [finding], None)["verdict"]["passed"] is passed
    failure = scenarios._failure(
        {
            "valid": True,
            "why": "",
            "fault": "",
            "verdict": {"passed": None, "findings": [asdict(finding)]},
            "thresholds": [],
        },
        tmp_path,
        allow_invalid=False,
    )
    assert failure
    assert failure.exit_code == 3
    assert "not judged in full: not reached" in failure.what


@pytest.mark.parametrize("allowed", [False, True])
def test_a_scenario_with_a_phase_that_was_not_answered_is_not_passed(tmp_path: Path, allowed: bool) -> None:
    """None of its thresholds failed, for it has none; nor is one passed that goes on."""
    (tmp_path / "mine.toml").write_text(
        'description = "Mine."\n' + "".join(f'[[phase]]\nname = "{name}"\nduration = 30\nrate = 100\n' for name in "ab")
    )
    met = []

    def send(phase: str, own: dict[str, Any], to: Path) -> dict[str, Any]:
        met.extend(json.loads(path.read_text())["verdict"]["passed"] for path in to.parent.glob(play.DOCUMENT))
        return summary.summary(made(EVERY_10_MS, 0.005, ERROR if met else OK))

    values = play.play(scenario.load(tmp_path / "mine.toml"), "mine", send, tmp_path / "s")
    assert met == [None]
    assert values["verdict"]["passed"] is False
    failure = scenarios._failure(values, tmp_path, allowed)
    assert failure
    assert failure.exit_code == 3
    assert "not one of 3000 requests succeeded" in failure.what
