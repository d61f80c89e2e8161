"""The null server, the generator's own ceiling, and a stall that shows as MLPerf LoadGen would show it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.cli import main
from loadtest.judge.summary import summarize
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.counts import counted
from loadtest.record.results import read
from loadtest.selftest import measure, nullserver
from modelathe.client import connect
from modelathe.errors import ModelMissing, UsageError
from modelathe.tensors import BATCH, TensorSpec
from serve.server.endpoint import Endpoint
from tests.conftest import TINY

PAYLOADS = payload.generate(nullserver.INPUTS, 16, 0)
PROTOCOLS = pytest.mark.parametrize("protocol", list(measure.PROTOCOLS))


def load(server: nullserver.NullServer, protocol: str, path: Path, **plan: Any) -> dict[str, Any]:
    scheme, connection = measure.PROTOCOLS[protocol]
    plan = {"duration": 0.5, "warmup": 0.0, "connection": connection, **plan}
    parts = [Part(server.model, PAYLOADS, tolerance=0.0)]
    drive.run(Plan(server.url(scheme), **plan), parts, path / "r.jsonl")
    return summarize(path / "r.jsonl")


@PROTOCOLS
def test_it_answers_what_it_says(protocol: str, tmp_path: Path) -> None:
    with nullserver.running() as server:
        values = load(server, protocol, tmp_path, concurrency=4)
        assert server.cpu() > 0
    requests = values["requests"]
    assert requests["done"] == requests["planned"] > 50, values["errors"]
    assert values["server"]["reconciled"]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_it_takes_the_shapes_of_any_model(scheme: str) -> None:
    inputs = (TensorSpec("image", "uint8", (BATCH, 3, 8, 8)), TensorSpec("text", "object", (BATCH, 2)))
    outputs = (TensorSpec("label", "object", (BATCH, 1)), TensorSpec("score", "float16", (BATCH, 10)))
    with nullserver.running(inputs=inputs, outputs=outputs) as server, connect(server.url(scheme)) as client:
        stated = client.metadata(server.model)
        assert [spec.name for specs in stated for spec in specs] == ["image", "text", "label", "score"]
        (sent,) = payload.generate(stated[0], 1, 0, batch=3)
        answer = client.infer(server.model, sent)
        assert {name: (array.shape, array.dtype.name) for name, array in answer.items()} == {
            "label": ((3, 1), "object"),
            "score": ((3, 10), "float16"),
        }
        assert counted(client, server.model).inference_count == 3
        with pytest.raises(ModelMissing):
            client.infer("other", sent)
        with pytest.raises(ModelMissing):
            client.metadata("other")


@pytest.mark.timed
@PROTOCOLS
def test_instances_hold_requests_for_their_time(protocol: str, tmp_path: Path) -> None:
    with nullserver.running(service=0.02, instances=2) as server:
        values = load(server, protocol, tmp_path, concurrency=8, duration=1.0)
    # Two at a time, 20 ms each: 100 per second, and of 8 in flight each waits for three others of its instance.
    assert values["rate"]["achieved"] == pytest.approx(100, rel=0.2)
    assert values["service_ms"]["p50"] == pytest.approx(80, rel=0.25)


def truth(planned: np.ndarray, service: float, stall: float, each: int, before: int) -> np.ndarray:
    """The latencies of a queue with one server; `before` requests were answered already."""
    free, latency = 0.0, []
    for n, at in enumerate(planned, before + 1):
        free = max(at, free) + service + (stall if n % each == 0 else 0.0)
        latency.append(free - at)
    return np.array(latency)


@pytest.mark.timed
@PROTOCOLS
def test_a_stall_shows_as_it_is(protocol: str, tmp_path: Path) -> None:
    with nullserver.running(service=0.005, stall=1.0, each=100) as server:
        with connect(server.http) as client:
            for _ in range(99 - len(PAYLOADS)):
                client.infer(server.model, PAYLOADS[0])
        values = load(server, protocol, tmp_path, rate=50.0, duration=5.0)
    # The rest of 99 asked for the right answers, so the first request of the run is the hundredth.
    expected = truth(read(tmp_path / "r.jsonl").planned, 0.005, 1.0, 100, before=99) * 1e3
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert values["latency_ms"][name] == pytest.approx(np.percentile(expected, percent), rel=0.1, abs=50), name
    # Two of three requests meet the stall or the queue that it leaves; a sender that waits shows one of a hundred.
    assert values["latency_ms"]["p50"] > 20 * 5
    assert values["latency_ms"]["p99"] > 900


@pytest.mark.timed
def test_a_closed_loop_hides_the_stall(tmp_path: Path) -> None:
    # Why a rate is asked for at all: with one in flight nobody sends while the server stands still.
    with nullserver.running(service=0.005, stall=0.5, each=100) as server:
        values = load(server, "http", tmp_path, concurrency=1, duration=2.0)
    assert values["latency_ms"]["p90"] < 50


def test_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = (
        "import time; from loadtest.selftest import nullserver\n"
        "with nullserver.running() as server: print(server.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_impossible_times() -> None:
    with pytest.raises(UsageError), nullserver.running(service=-1):
        pass


def test_the_selftest_prints_one_document() -> None:
    done = subprocess.run([sys.executable, "-m", "loadtest", "selftest", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert [found["protocol"] for found in values["protocols"]] == list(measure.PROTOCOLS)
    for found in values["protocols"]:
        assert found["ceiling"]["rate"] == max(point["rate"] for point in found["closed"])
        assert found["ceiling"]["at_least"] == (found["ceiling"]["limit"] != "generator")
        assert not sum(point["failed"] for point in found["closed"])
    # What the raw protocol is there for; the margin is wide, for other processes have the same cores.
    by_name = {found["protocol"]: found["per_core"] for found in values["protocols"]}
    assert by_name["http"] > by_name["grpc stream"]


def test_the_selftest_takes_the_shapes_of_a_served_model(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(measure, "_SECONDS", 0.2)
    run, shapes = drive.run, set()

    def watched(plan: Plan, parts: list[Part], *more: Any) -> None:
        shapes.update(array.shape for inputs in parts[0].payloads for array in inputs.values())
        run(plan, parts, *more)

    monkeypatch.setattr(drive, "run", watched)
    with pytest.raises(SystemExit) as left:
        main(["selftest", TINY, "--url", endpoint.grpc, "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)["protocols"]
    assert not sum(point["failed"] for one in found for point in one["closed"])
    assert shapes == {(1, 4)}


def test_the_selftest_says_who_was_the_limit() -> None:
    def limit(client: float, server: float, staged: bool = False) -> tuple[bool, str]:
        found = measure._limit({"client_cpu": client, "server_cpu": server}, staged)
        return found["at_least"], found["limit"]

    assert limit(0.97, 0.99) == (False, "generator")
    assert limit(0.5, 0.99) == (True, "null server")
    assert limit(0.5, 0.5) == (True, "other load")
    assert limit(0.1, 0.1, staged=True) == (True, "staged times")


def test_the_selftest_wants_a_model_and_its_server() -> None:
    wrong = subprocess.run([sys.executable, "-m", "loadtest", "selftest", "m"], capture_output=True, text=True)
    assert (wrong.returncode, "go together" in wrong.stderr) == (2, True)
