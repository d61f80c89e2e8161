import asyncio
import json
import math
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from loadtest.judge.summary import summarize
from loadtest.load import drive, loop
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import OK, read
from modelathe.errors import BadInput, RequestRejected, ServerAbsent, UsageError
from modelathe.tensors import BATCH, TensorSpec

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])
PAYLOADS = payload.generate([TensorSpec("x", "float32", (BATCH, 4))], 16, 0, batch=2)


def run(server: Any, scheme: str, path: Path, tolerance: float | None = None, **plan: Any) -> dict[str, Any]:
    plan = {"duration": 0.5, "warmup": 0.0, **plan}
    drive.run(Plan(server.url(scheme), **plan), [Part("double", PAYLOADS, tolerance=tolerance)], path / "r.jsonl")
    return summarize(path / "r.jsonl")


@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 100.0}, {"rate": 100.0, "arrival": "poisson"}])
def test_the_servers_count_is_ours(stand_in, scheme: str, load: dict[str, Any], tmp_path: Path) -> None:
    with stand_in() as server:
        document = run(server, scheme, tmp_path, **load)
    requests = document["requests"]
    assert requests["planned"] == requests["sent"] == requests["done"] > 10
    assert document["server"]["success"] == requests["done"]
    assert document["server"]["reconciled"]
    assert document["rate"]["achieved"] > 0
    assert document["rate"]["samples"] == pytest.approx(2 * document["rate"]["achieved"])
    results = read(tmp_path / "r.jsonl")
    assert (results.sent >= results.planned).all()
    assert (results.done > results.sent).all()


@SCHEMES
def test_the_clock_starts_with_the_counted_part(stand_in, scheme: str, tmp_path: Path) -> None:
    """So that a moment of the run is found in the server's log: not before the warm-up."""
    with stand_in() as server:
        begun = time.time()
        run(server, scheme, tmp_path, concurrency=1, warmup=0.5)
        ended = time.time()
    results = read(tmp_path / "r.jsonl")
    start = datetime.fromisoformat(results.header["clock_start"]).timestamp()
    assert begun + 0.5 < start
    assert start + results.done.max() < ended + 0.01


@SCHEMES
def test_counts_that_begin_anew_are_none(stand_in, scheme: str, tmp_path: Path) -> None:
    """As a promotion during the load has it: what the version before counted is gone with it."""
    with stand_in(inferences=100_000) as server:

        def reload(progress: loop.Progress) -> None:
            if progress.ended and server.inferences > 100_000:
                server.inferences = 0

        plan = Plan(server.url(scheme), 0.5, concurrency=1, warmup=0.0)
        drive.run(plan, [Part("double", PAYLOADS)], tmp_path / "r.jsonl", reload)
    document = summarize(tmp_path / "r.jsonl")
    assert document["requests"]["done"] > 10
    assert document["server"] is None
    assert any("began at 0 again" in note for note in document["notes"])


@SCHEMES
def test_a_closed_loop_keeps_its_concurrency(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in() as server:
        run(server, scheme, tmp_path, concurrency=4)
    results = read(tmp_path / "r.jsonl")
    events = sorted([(at, 1) for at in results.sent] + [(at, -1) for at in results.done], key=lambda event: event)
    in_flight = np.cumsum([change for _, change in events])
    assert in_flight.max() == 4
    np.testing.assert_array_equal(results.planned, results.sent)


@pytest.mark.timed
def test_an_open_loop_sends_what_its_schedule_says(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        run(server, "http", tmp_path, rate=50.0)
    results = read(tmp_path / "r.jsonl")
    np.testing.assert_allclose(results.planned, np.arange(25) / 50, atol=1e-6)


@pytest.mark.timed
@SCHEMES
def test_a_stall_shows_in_the_latency_and_not_in_the_sending(stand_in, scheme: str, tmp_path: Path) -> None:
    # A generator that waits for answers sends nothing during the stall and reports one slow request.
    with stand_in(stall=70, stall_seconds=0.5) as server:
        run(server, scheme, tmp_path, rate=100.0, duration=2.0)
    results = read(tmp_path / "r.jsonl")
    latency = results.done - results.planned
    assert len(results.planned) == 200
    stalled = latency > 0.1
    # 0.5 s at 100/s: some 40 requests came in while the server stood still for more than 0.1 s yet.
    assert stalled.sum() >= 35
    assert np.percentile(latency, 99) > 0.4
    # They arrived at the server all the same, one every 10 ms.
    lag = (results.sent - results.planned)[stalled]
    assert np.percentile(lag, 90) < 0.1
    assert np.percentile(np.diff(results.sent[stalled]), 90) < 0.1


@pytest.mark.timed
@SCHEMES
def test_a_run_at_its_limit_of_requests_in_flight_drops_and_is_invalid(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in(stall=30, stall_seconds=1.0) as server:
        document = run(server, scheme, tmp_path, rate=100.0, in_flight=5)
    requests = document["requests"]
    assert requests["dropped"] > 0
    assert requests["planned"] == 50 == requests["done"] + requests["dropped"]
    assert not document["valid"]
    results = read(tmp_path / "r.jsonl")
    dropped = np.isnan(results.sent)
    assert np.isnan(results.done[dropped]).all()
    assert any("could not be sent" in note for note in document["notes"])
    assert document["backlog"]["most"] == 5
    assert 0.1 < document["backlog"]["full"] < 0.5
    assert "the server was slower than the load, its backlog was full" in document["why"]


@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 4}, {"rate": 100.0}])
def test_a_server_that_dies_ends_the_run_early(
    stand_in, scheme: str, load: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "GIVE_UP", 0.3)
    with stand_in(die=60) as server:
        document = run(server, scheme, tmp_path, duration=60.0, **load)
    assert not document["valid"]
    assert "stopped answering" in document["why"]
    assert document["requests"]["done"] > 0
    assert document["requests"]["failed"] > 0
    assert document["server"] is None
    assert read(tmp_path / "r.jsonl").end["end"] < 30
    if "rate" in load:
        assert document["requests"]["planned"] == 6000


@SCHEMES
def test_garbage_and_errors_are_failures_not_answers(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in(garbage=True, since=30) as server:
        document = run(server, scheme, tmp_path, concurrency=2)
    assert document["requests"]["done"] > 0
    assert document["requests"]["failed"] > 0
    assert document["errors"][0]["verdict"] == "error"


@SCHEMES
def test_a_run_where_all_requests_fail_is_invalid(stand_in, scheme: str, tmp_path: Path) -> None:
    refusal = (503, grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    with stand_in(refuse=refusal, since=2) as server:
        document = run(server, scheme, tmp_path, concurrency=2)
    assert not document["valid"]
    assert "not one of" in document["why"]
    assert "Exceeds maximum queue size" in document["why"]
    assert math.isnan(document["latency_ms"]["p50"])
    assert read(tmp_path / "r.jsonl").end["gone"] is False


@pytest.mark.timed
@SCHEMES
def test_a_hanging_server_times_out(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in(hang=threading.Event(), since=30) as server:
        document = run(server, scheme, tmp_path, concurrency=2, timeout=0.2)
    assert document["requests"]["timed_out"] > 0
    assert document["latency_ms"]["max"] >= 199


@SCHEMES
def test_a_rejected_payload_is_one_clear_error(stand_in, scheme: str, tmp_path: Path) -> None:
    refusal = (400, grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'x'")
    with stand_in(refuse=refusal) as server, pytest.raises(RequestRejected, match="unexpected shape"):
        run(server, scheme, tmp_path, concurrency=2)
    assert not (tmp_path / "r.jsonl").exists()


@SCHEMES
@pytest.mark.parametrize("wrong", [False, True])
def test_outputs_are_compared_under_load(stand_in, scheme: str, wrong: bool, tmp_path: Path) -> None:
    with stand_in(wrong=wrong, since=50) as server:
        document = run(server, scheme, tmp_path, concurrency=2, tolerance=1e-5)
    assert (document["requests"]["mismatched"] > 0) == wrong
    assert document["requests"]["done"] > 0
    assert ("differs by more than" in document["why"]) == wrong
    if wrong:
        assert not document["valid"]


@SCHEMES
def test_the_warm_up_is_not_counted(stand_in, scheme: str, tmp_path: Path) -> None:
    with stand_in() as server:
        document = run(server, scheme, tmp_path, rate=50.0, warmup=0.4)
        assert server.inferences == 1 + 20 + 25
    assert document["requests"]["planned"] == document["server"]["success"] == 25


def test_a_server_that_dies_in_the_warm_up_is_absent(stand_in, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "GIVE_UP", 0.3)
    with stand_in(die=10) as server, pytest.raises(ServerAbsent, match="warm-up"):
        run(server, "http", tmp_path, concurrency=2, warmup=60.0)


@SCHEMES
def test_a_notebook_has_an_event_loop_already(stand_in, scheme: str, tmp_path: Path) -> None:
    async def cell() -> dict[str, Any]:
        return run(server, scheme, tmp_path, concurrency=2)

    with stand_in() as server:
        document = asyncio.run(cell())
    assert document["requests"]["done"] > 0


def test_an_absent_server_leaves_an_older_file_alone(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("precious")
    with pytest.raises(ServerAbsent):
        drive.run(Plan("http://127.0.0.1:9", 1, concurrency=1), [Part("m", PAYLOADS)], tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == "precious"


def test_a_folder_that_does_not_exist_is_named_before_the_server_is_asked(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        drive.run(Plan("http://127.0.0.1:9", 1, concurrency=1), [Part("m", PAYLOADS)], tmp_path / "none" / "r.jsonl")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "concurrency, a rate or a trace"),
        ({"concurrency": 1, "rate": 1.0}, "concurrency, a rate or a trace"),
        ({"concurrency": 0}, "concurrency"),
        ({"rate": 0.0}, "rate"),
        ({"rate": -1.0}, "rate"),
        ({"rate": math.inf}, "rate"),
        ({"rate": math.nan}, "rate"),
        ({"concurrency": 1, "duration": 0.0}, "duration"),
        ({"concurrency": 1, "timeout": 0.0}, "timeout"),
        ({"concurrency": 1, "warmup": -1.0}, "warmup"),
        ({"rate": 1.0, "arrival": "bursty"}, "bursty"),
        ({"rate": 1.0, "think": 1.0}, "think"),
        ({"trace": "t", "speed": 0.0}, "speed"),
        ({"concurrency": 1, "url": "nowhere"}, "address"),
    ],
)
def test_a_plan_that_makes_no_sense(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Plan(**{"url": "http://h:1", "duration": 1.0, **values})


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@SCHEMES
def test_a_signal_keeps_the_results_so_far(stand_in, scheme: str, sent: int, code: int, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        command = [sys.executable, "-m", "loadtest", "run", "double", "--url", server.url(scheme), "--duration", "60s"]
        process = subprocess.Popen(
            [*command, "--output", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (path.exists() and path.read_text().count("\n") > 20):
            time.sleep(0.05)
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in out + err
    assert all(json.loads(line) for line in path.read_text().splitlines())
    results = read(path)
    assert results.end is None
    assert results.of(OK).sum() >= 20
    document = summarize(path)
    assert not document["valid"]
    assert "interrupted" in document["why"]
