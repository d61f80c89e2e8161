"""System shared memory against the real server, whose registration wants its secret."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loadtest.judge.summary import summarize
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Fresh, Part
from loadtest.record.results import MISMATCH, read
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import MachineError, RequestRejected, UsageError
from serve.server.control import ADMIN_KEY
from serve.server.endpoint import Endpoint
from tests.conftest import TINY, TINY_INPUTS, TINY_WEIGHT

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc", "stream"])
PAYLOADS = payload.generate(TINY_INPUTS, 16, 0, batch=2)


def connection(endpoint: Endpoint, scheme: str, **more: Any) -> Connection:
    name = ADMIN_KEY if scheme == "http" else f"triton-grpc-protocol-{ADMIN_KEY}"
    headers = ((name, endpoint.secret),) if endpoint.secret else ()
    return Connection(headers=headers, streams=int(scheme == "stream"), **{"shared_memory": "system", **more})


def plan(endpoint: Endpoint, scheme: str, **more: Any) -> Plan:
    url = endpoint.http if scheme == "http" else endpoint.grpc
    more = {"concurrency": 4, "duration": 0.5, "warmup": 0.1, "connection": connection(endpoint, scheme), **more}
    return Plan(url, **more)


def left(endpoint: Endpoint) -> tuple[list[str], Any]:
    """What is left in this machine's memory, and in the server."""
    with connect(endpoint.http, connection=connection(endpoint, "http")) as client:
        known = client._client.get_system_shared_memory_status(**client._options)
    return there(os.getpid()), known


def there(pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"modelathe-load-*-{pid}-*")]


@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 4}, {"concurrency": None, "rate": 100.0}])
def test_tensors_go_through_memory_and_are_checked(
    endpoint: Endpoint, scheme: str, load: dict[str, Any], tmp_path: Path
) -> None:
    drive.run(plan(endpoint, scheme, **load), [Part(TINY, PAYLOADS, tolerance=1e-5)], tmp_path / "r.jsonl")
    values = summarize(tmp_path / "r.jsonl")
    assert values["requests"]["done"] > 20, values["errors"]
    assert values["requests"]["done"] == values["requests"]["planned"], values["errors"]
    assert values["server"]["reconciled"]
    assert left(endpoint) == ([], [])
    assert endpoint.secret not in (tmp_path / "r.jsonl").read_text()


def test_every_worker_has_memory_of_its_own(endpoint: Endpoint, tmp_path: Path) -> None:
    with_memory = set()

    def look(_: Any) -> None:
        with_memory.update(child.pid for child in psutil.Process().children() if there(child.pid))

    shared = plan(endpoint, "grpc", workers=2, duration=1.0)
    drive.run(shared, [Part(TINY, PAYLOADS, tolerance=1e-5)], tmp_path / "r.jsonl", look)
    values = summarize(tmp_path / "r.jsonl")
    assert values["requests"]["done"] > 20, values["errors"]
    assert values["requests"]["done"] == values["requests"]["planned"], values["errors"]
    assert left(endpoint)[1] == []
    assert len(with_memory) == 2
    assert not any(map(there, with_memory))


@SCHEMES
def test_a_wrong_output_in_memory_is_a_mismatch(endpoint: Endpoint, scheme: str, tmp_path: Path) -> None:
    right = [{"y": inputs["x"] @ TINY_WEIGHT} for inputs in PAYLOADS]
    wrong = [{"y": outputs["y"] + (n == 3)} for n, outputs in enumerate(right)]
    parts = [Part(TINY, PAYLOADS, tolerance=1e-5, expected=wrong)]
    drive.run(plan(endpoint, scheme, requests=64, duration=30), parts, tmp_path / "r.jsonl")
    results = read(tmp_path / "r.jsonl")
    np.testing.assert_array_equal(results.of(MISMATCH), results.payload == 3)
    assert len(results.payload) == 64


@SCHEMES
def test_a_server_that_keeps_its_memory_to_itself(endpoint: Endpoint, scheme: str, tmp_path: Path) -> None:
    without = replace(connection(endpoint, scheme), headers=())
    with pytest.raises(RequestRejected, match=r"does not take shared memory.*restricted") as caught:
        drive.run(plan(endpoint, scheme, connection=without), [Part(TINY, PAYLOADS)], tmp_path / "r.jsonl")
    assert ADMIN_KEY in caught.value.fix
    assert left(endpoint) == ([], [])


@contextmanager
def at_work(endpoint: Endpoint, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A client, in a process group of its own, that sends over shared memory."""
    command = [sys.executable, "-m", "loadtest", "run", TINY, "--url", endpoint.http, "--duration", "60s"]
    command += ["--shared-memory", "system", "--header", f"{ADMIN_KEY}: {endpoint.secret}", "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        while not (output.exists() and output.read_text().count("\n") > 20):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        assert there(process.pid)
        yield process
    finally:
        process.kill()


def test_what_was_killed_with_its_helpers_is_swept_by_the_next_run(endpoint: Endpoint, tmp_path: Path) -> None:
    with at_work(endpoint, tmp_path / "killed.jsonl") as process:
        os.killpg(process.pid, signal.SIGKILL)  # Python's resource tracker too
        process.communicate(timeout=30)
    left_over = Path("/dev/shm", there(process.pid)[0])
    others = [left_over.with_name(left_over.name.replace(f"-{process.pid}-", f"-{os.getppid()}-"))]
    others.append(left_over.with_name(f"modelathe-load-1-{process.pid}-0"))  # of another namespace of processes
    try:
        for other in others:
            other.touch()
        drive.run(plan(endpoint, "http"), [Part(TINY, PAYLOADS)], tmp_path / "r.jsonl")
        assert there(process.pid) == [others[1].name]
        assert others[0].exists()
    finally:
        for other in others:
            other.unlink()
    with connect(endpoint.http, connection=connection(endpoint, "http")) as client:
        client.order("unregister_system_shared_memory")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_stays_in_memory_after_a_signal(endpoint: Endpoint, number: int, code: int, tmp_path: Path) -> None:
    with at_work(endpoint, tmp_path / "r.jsonl") as process:
        os.kill(process.pid, number)
        process.communicate(timeout=30)
    assert process.returncode == code
    deadline = time.monotonic() + 20  # after SIGKILL Python's resource tracker does it
    while there(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not there(process.pid)
    with connect(endpoint.http, connection=connection(endpoint, "http")) as client:
        known = client._client.get_system_shared_memory_status(**client._options)
        # A killed process cannot take its regions back; the server knows them until it ends.
        assert known if number == signal.SIGKILL else not known
        client.order("unregister_system_shared_memory")


def test_what_does_not_go_together(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Part(TINY, PAYLOADS, fresh=Fresh(TINY_INPUTS, 2, 0))
    with pytest.raises(UsageError, match="new values"):
        drive.run(plan(endpoint, "http"), [fresh], tmp_path / "r.jsonl")

    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(MachineError, match="4,096 are left"):
        drive.run(plan(endpoint, "http", concurrency=512), [Part(TINY, PAYLOADS)], tmp_path / "r.jsonl")


def test_cuda_memory_without_a_gpu(no_gpu: None, endpoint: Endpoint, tmp_path: Path) -> None:
    cuda = connection(endpoint, "http", shared_memory="cuda")
    with pytest.raises(MachineError, match="no cuda shared memory"):
        drive.run(plan(endpoint, "http", connection=cuda), [Part(TINY, PAYLOADS)], tmp_path / "r.jsonl")


@pytest.mark.gpu
@SCHEMES
def test_cuda_memory(endpoint: Endpoint, scheme: str, tmp_path: Path) -> None:
    cuda = connection(endpoint, scheme, shared_memory="cuda")
    parts = [Part(TINY, PAYLOADS, tolerance=1e-5)]
    drive.run(plan(endpoint, scheme, connection=cuda), parts, tmp_path / "r.jsonl")
    requests = summarize(tmp_path / "r.jsonl")["requests"]
    assert requests["done"] == requests["planned"] > 20
