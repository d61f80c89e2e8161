import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from loadtest.cli import main
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.probing import edge
from loadtest.probing.probe import conditions, measure, prober
from loadtest.probing.search import CLIENT, DISTURBED, FAILED, USELESS, verdict
from loadtest.record.results import DROPPED, ERROR, MISMATCH, TIMEOUT, VERDICTS, Results
from loadtest.selftest import nullserver
from modelathe.errors import UsageError

END = {
    "end": 3.0,
    "client_cpu": 0.1,
    "client_cores": 1,
    "gone": False,
    "errors": [{"verdict": MISMATCH, "text": "other", "count": 1}],
}
PLAN = {"duration": 2.5, "rate": 100.0, "profile": "flat", "in_flight": 50, "workers": 1, "concurrency": None}


@pytest.fixture(autouse=True)
def _keep_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)


def run(took: float = 0.01, late: float = 0.0, verdicts: dict[int, str] | None = None) -> Results:
    """250 requests in 2.5 s."""
    planned = np.arange(250) / 100
    sent, verdict = planned + late, np.zeros(250, np.int8)
    done = sent + took
    for at, name in (verdicts or {}).items():
        verdict[at] = VERDICTS.index(name)
        if name == DROPPED:
            sent[at] = done[at] = np.nan
    parts = [{"model": "m", "version": "1", "payloads": 1, "batch": 1, "tolerance": None}]
    header = {"plan": PLAN, "parts": parts, "model": "m", "url": "http://h:1"}
    payload = np.zeros(250, np.int32)
    return Results(header, END, planned, sent, done, verdict, payload, payload + 1, payload, [""], [])


def test_conditions_are_shares() -> None:
    found = conditions(["errors < 0.5%, p99 < 20ms", "service p99.9 <= 1s"])
    assert [(one.text, one.limit) for one in found] == [
        ("p99 < 20ms", 0.02),
        ("service p99.9 <= 1s", 1.0),
        ("errors < 0.5%", None),
    ]
    assert [one.allowed for one in found] == pytest.approx([0.01, 0.001, 0.005])
    implied = conditions(["p50 < 3ms", "mismatches == 0"])
    assert [one.text for one in implied] == ["p50 < 3ms", "mismatches == 0", "errors < 1%"]
    assert implied[1].allowed == edge.LEAST_ALLOWED


@pytest.mark.parametrize(
    "sentence", ["mean < 5ms", "max < 5ms", "rate > 5", "p99 > 5ms", "errors < 5", "lag p99 < 1ms"]
)
def test_what_is_no_share_cannot_be_searched_for(sentence: str) -> None:
    with pytest.raises(UsageError, match="cannot be searched for"):
        conditions([sentence])


def test_a_run_becomes_counts_and_its_first_moments_do_not_count() -> None:
    asked = conditions(["p99 < 5ms, errors < 1%"])
    probe = measure(run(took=0.01, verdicts={10: ERROR, 249: ERROR}), asked, settle=0.5)
    assert probe.counted.shape == probe.bad.shape == (2, edge.BLOCKS)
    assert probe.counted.sum(axis=1).tolist() == [200, 200]
    assert probe.bad.sum(axis=1).tolist() == [200, 1]
    assert probe.bad[1, -1] == 1
    assert probe.latency == pytest.approx(0.01)
    assert (probe.fault, probe.client) == ("", "")
    assert not measure(run(took=0.001), asked).bad.any()


@pytest.mark.parametrize("failed", [ERROR, TIMEOUT, DROPPED])
def test_a_failed_request_is_slower_than_any_limit(failed: str) -> None:
    """Two answers of 200 that came fast and said no, or a timeout that is shorter than the limit."""
    asked = conditions(["p99.9 < 1s, service p99.9 < 1s, errors < 5%"])
    probe = measure(run(took=0.01, verdicts=dict.fromkeys((100, 200), failed)), asked, settle=0.5)
    dropped = failed == DROPPED
    assert probe.counted.sum(axis=1).tolist() == [200, 198 if dropped else 200, 200]
    assert probe.bad.sum(axis=1).tolist() == ([2, 0, 0] if dropped else [2, 2, 2])


def test_fast_refusals_do_not_hold_a_percentile() -> None:
    asked = conditions(["p99.9 < 1s, errors < 5%"])
    probe = measure(run(took=0.01, verdicts=dict.fromkeys(range(60, 250, 20), ERROR)), asked)
    assert verdict(probe, [one.allowed for one in asked]) == FAILED


def test_the_server_and_the_client_are_blamed_for_their_own_faults() -> None:
    asked = conditions(["p99 < 5ms"])
    assert "left late" in measure(run(late=0.05), asked).client
    assert "answers under load were wrong" in measure(run(verdicts={99: MISMATCH}), asked).fault
    assert "not one of" in measure(run(verdicts=dict.fromkeys(range(250), ERROR)), asked).fault


def held(most: int, full: float, late_ms: float = 0.1, rate: float = 100.0) -> Results:
    """A run whose requests left late, because so many were in flight for `full` seconds or because the client was."""
    found = run(took=0.2, late=0.05)
    end = END | {"backlog": {"most": most, "full": full}, "loop_lag_ms": {"max": late_ms}}
    return replace(found, header=found.header | {"plan": PLAN | {"rate": rate}}, end=end)


def test_a_full_backlog_is_the_servers_fault_whatever_lowered_the_limit() -> None:
    asked = conditions(["p99 < 100ms"])
    full = measure(held(50, 1.0), asked)
    assert full.fault == "its backlog was full for 1.0 s: 50 requests in flight"
    assert full.client == ""
    # The limit of open files allows fewer than the plan does.
    fewer = measure(held(40, 1.0), asked)
    assert "40 requests in flight; 50 were planned, the limit of open files allows no more" in fewer.fault
    assert verdict(fewer, [0.01, 0.01]) == FAILED


def test_a_full_backlog_is_not_the_servers_fault_when_the_client_made_it() -> None:
    asked = conditions(["p99 < 100ms"])
    paused = measure(held(50, 0.3, late_ms=200.0), asked)
    assert paused.fault == ""
    assert "left late" in paused.client
    assert verdict(paused, [0.01, 0.01]) == DISTURBED
    # At 1,000 requests/s, a server that holds p99 < 100 ms may have 100 in flight.
    short = measure(held(50, 1.0, rate=1000.0), asked)
    assert short.fault == ""
    assert "more in flight would be needed" in short.client
    assert verdict(short, [0.01, 0.01]) == CLIENT


@contextmanager
def open_files(most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


NULL = [Part("null", payload.generate(nullserver.INPUTS, 1, 0))]


@pytest.mark.timed
@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_an_overloaded_server_is_not_called_disturbed_where_few_files_may_be_open(scheme: str) -> None:
    asked, used = conditions(["p99 < 100ms"]), len(list(Path("/proc/self/fd").iterdir()))
    with nullserver.running(service=0.002) as server, open_files(most := 256 + used):
        probe = prober(Plan(server.url(scheme), 1.0, rate=1.0), NULL, asked)(1000.0, 1.5)
    assert verdict(probe, [0.01, 0.01]) == FAILED
    assert f"{most - 64} requests in flight; 800 were planned, the limit of open files allows no more" in probe.fault


def test_a_probe_without_requests_says_nothing_of_the_server() -> None:
    columns = ("planned", "sent", "done", "verdict", "payload", "tries", "kind")
    early = replace(run(), **{name: getattr(run(), name)[:1] for name in columns})
    probe = measure(early, conditions(["p99 < 1ms"]))
    assert (probe.fault, probe.client) == ("", "no request was due")


def command(capsys: pytest.CaptureFixture[str], url: str, slo: str, *args: object) -> tuple[int, dict, str]:
    with pytest.raises(SystemExit) as left:
        main(["capacity", args[0], "--url", url, "--slo", slo, *map(str, args[1:]), "--json"])  # type: ignore[list-item]
    out, err = capsys.readouterr()
    return int(left.value.code or 0), json.loads(out), err


FAST = ("--duration", "1s", "--budget", "4s", "--warmup", "0s")


@pytest.mark.timed
def test_the_command_against_a_real_server(endpoint, tmp_path: Path, capsys) -> None:
    code, values, _ = command(capsys, endpoint.http, "p50 < 5s", "tiny", *FAST, "--output", tmp_path / "probes")
    assert values["probes"]
    # A busy machine may send none of the probes as planned, and then the exit code says so.
    if values["rate"] is None:
        assert code == 3
        assert all(probe["verdict"] in USELESS for probe in values["probes"])
        assert "no probe counted" in values["error"]["what"]
    else:
        assert code == 0
        assert values["low"] <= values["rate"]
    assert [one["text"] for one in values["conditions"]] == ["p50 < 5s", "errors < 1%"]
    assert len(list((tmp_path / "probes").iterdir())) == len(values["probes"])


@pytest.mark.timed
def test_no_rate_holds(stand_in, capsys) -> None:
    with stand_in(wrong=True, since=20) as server:
        code, values, err = command(capsys, server.http, "p99 < 1us", "double", *FAST, "--start", 4, "--budget", "30s")
    assert code == 3
    assert values["rate"] is None
    assert values["binding"] == "p99 < 1us"
    assert values["stopped"] == "even the lowest rate did not hold"
    assert "no rate held" in err


@pytest.mark.parametrize(
    ("verdict", "headline", "fix"),
    [
        ("undecided", "capacity unknown: no probe decided", "give it more time to decide"),
        ("disturbed", "capacity unknown: no probe counted", "use a client machine that has nothing else to do"),
        ("failed", "no rate holds p99 < 1s", "allow more"),
    ],
)
def test_nothing_is_claimed_that_no_probe_decided(verdict: str, headline: str, fix: str) -> None:
    from loadtest.probing import report

    probe = {"verdict": verdict, "rate": 1823.5, "why": "busy"}
    values = {"rate": float("nan"), "slo": "p99 < 1s", "stopped": "the time was spent", "model": "m", "probes": [probe]}
    assert report.headline(values) == headline
    refused = report.refusal(values)
    assert refused.fix.startswith(fix)
    assert verdict == "disturbed" or "(the lowest was 1,823.5/s)" in refused.what


def test_a_server_that_dies_or_refuses_ends_the_search(stand_in, capsys) -> None:
    refusal = (503, grpc.StatusCode.UNAVAILABLE, "too busy")
    for faults, words in (({"die": 50}, "connection"), ({"refuse": refusal, "since": 50}, "too busy")):
        with stand_in(**faults) as server:
            code, values, err = command(capsys, server.http, "p99 < 1s", "double", *FAST, "--start", 20)
        assert code == 5
        assert words in err
        assert values["error"]["kind"] in ("ServerAbsent", "ServerFault")


def test_wrong_options_are_found_before_any_load(capsys) -> None:
    for slo, more in (("p99 < 20", ()), ("mean < 5ms", ()), ("p99 < 20ms", ("--start", 0))):
        code, values, _ = command(capsys, "http://127.0.0.1:9", slo, "m", *more)
        assert code == 2
        assert values["error"]["fix"]
