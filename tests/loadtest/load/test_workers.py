import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loadtest.judge.summary import summarize
from loadtest.load import drive, share, workers
from loadtest.plan.data import payload
from loadtest.plan.data.answers import Answers
from loadtest.plan.load import Load
from loadtest.plan.package import pack, unpack
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Fresh, Part
from loadtest.record.results import read
from modelathe.errors import ServerAbsent, UsageError
from modelathe.tensors import BATCH, TensorSpec

SPEC = TensorSpec("x", "float32", (BATCH, 4))
PAYLOADS = payload.generate([SPEC], 16, 0, batch=2)
SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])


def run(server: Any, path: Path, scheme: str = "http", tolerance: float | None = None, **plan: Any) -> dict[str, Any]:
    plan = {"duration": 0.5, "warmup": 0.0, "workers": 2, **plan}
    drive.run(Plan(server.url(scheme), **plan), [Part("double", PAYLOADS, tolerance=tolerance)], path / "r.jsonl")
    return summarize(path / "r.jsonl")


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (path / "r.jsonl").read_text().splitlines()) if "n" in row]


@pytest.mark.timed
@SCHEMES
@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 100.0, "duration": 1.0}])
def test_workers_share_the_load(stand_in, scheme: str, load: dict[str, Any], tmp_path: Path) -> None:
    with stand_in() as server:
        document = run(server, tmp_path, scheme, tolerance=1e-5, **load)
    requests = document["requests"]
    assert requests["planned"] == requests["done"] > 10
    assert document["server"]["reconciled"]
    found = rows(tmp_path)
    assert sorted({row["worker"] for row in found}) == [0, 1]
    # A worker that was faster has numbers that the other did not come to.
    assert len({row["n"] for row in found}) == len(found)
    assert all(row["n"] % 2 == row["worker"] for row in found)
    end = read(tmp_path / "r.jsonl").end
    assert end["client_cores"] == min(2, len(os.sched_getaffinity(0)))
    assert end["client_cpu"] > 0
    if "rate" in load:
        np.testing.assert_allclose(read(tmp_path / "r.jsonl").planned, np.arange(100) / 100, atol=1e-6)


@pytest.mark.timed
def test_workers_begin_together(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        run(server, tmp_path, rate=200.0, duration=1.0)
    found = rows(tmp_path)
    lag = [np.median([row["sent"] - row["planned"] for row in found if row["worker"] == worker]) for worker in (0, 1)]
    # If each began when it was ready, the later one's lag would be the difference.
    assert max(lag) < 0.1


def test_a_limit_of_requests_is_shared(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        document = run(server, tmp_path, concurrency=3, requests=31, duration=30.0)
    assert document["requests"]["done"] == 31
    assert sorted(row["n"] for row in rows(tmp_path)) == list(range(31))


def test_wrong_outputs_are_found_by_workers(stand_in, tmp_path: Path) -> None:
    with stand_in(wrong=True, since=40) as server:
        document = run(server, tmp_path, concurrency=2, tolerance=1e-5)
    assert document["requests"]["mismatched"] > 0
    assert document["errors"][0]["verdict"] == "mismatch"


def test_a_server_that_dies_ends_the_workers(stand_in, tmp_path: Path) -> None:
    with stand_in(die=60) as server:
        document = run(server, tmp_path, concurrency=4, duration=60.0)
    assert "stopped answering" in document["why"]
    assert read(tmp_path / "r.jsonl").end["end"] < 30
    assert not _children()


def test_a_server_that_dies_in_the_warm_up_of_workers_is_absent(stand_in, tmp_path: Path) -> None:
    with stand_in(die=10) as server, pytest.raises(ServerAbsent, match="warm-up"):
        run(server, tmp_path, concurrency=2, warmup=60.0)
    assert not _children()


def test_more_workers_than_requests_in_flight() -> None:
    with pytest.raises(UsageError, match="fewer workers"):
        Plan("http://h:1", 1.0, concurrency=2, workers=3)


def _children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "loadtest.load.worker" in " ".join(child.cmdline())]


def _worker_of(process: "subprocess.Popen[str]") -> psutil.Process:
    return psutil.Process(process.pid).children()[0]


def interrupt(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGINT)


def terminate(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGTERM)


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()


def kill_a_worker(process: "subprocess.Popen[str]") -> None:
    _worker_of(process).kill()


ENDS = [
    (interrupt, 130, "interrupted"),
    (terminate, 143, "stopped by SIGTERM"),
    (kill_a_worker, 5, "died: killed by SIGKILL"),
    (kill, -signal.SIGKILL, ""),
]


@pytest.mark.parametrize(("end", "code", "said"), ENDS, ids=[end[0].__name__ for end in ENDS])
def test_what_ends_a_run_early_keeps_the_results_and_leaves_no_worker(
    stand_in, end: Callable[..., None], code: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        command = [sys.executable, "-m", "loadtest", "run", "double", "--url", server.http, "--duration", "60s"]
        process = subprocess.Popen(
            [*command, "--workers", "2", "--concurrency", "4", "--output", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") > 50):
            time.sleep(0.05)
        children = psutil.Process(process.pid).children()
        end(process)
        out, err = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=20)
    assert process.returncode == code, err
    assert not alive
    assert len(children) == 2
    assert said in err
    assert code < 0 or f"results so far: {path}" in err
    assert "Traceback" not in out + err
    assert err.count("error: ") <= 1
    document = summarize(path)
    assert document["requests"]["done"] >= 40
    assert "interrupted" in document["why"]


def test_a_package_brings_everything_along() -> None:
    plan = Plan("http://h:1", 2.0, rate=5.0, workers=2)
    fresh = Fresh([SPEC, TensorSpec("s", "object", (BATCH,), examples=(b"a", b"\xff"))], 2, 7)
    texts = np.array([[b"one", "zwei"], [b"", b"\x00"]], object)
    parts = [
        Part("a", [{"x": np.ones((2, 4), np.float32), "s": texts}], tolerance=1e-3, fresh=fresh, weight=2),
        Part("b", PAYLOADS, "3", expected=PAYLOADS),
    ]
    unpacked = unpack(pack(Load(plan, parts, Answers({3: ({"y": np.arange(3)}, 0.5)}))))
    again, answers = unpacked.parts, unpacked.answers
    assert unpacked.plan == plan
    assert [(part.model, part.version, part.weight, part.tolerance) for part in again] == [
        ("a", "", 2, 1e-3),
        ("b", "3", 1.0, None),
    ]
    assert again[0].payloads[0]["s"].tolist() == [[b"one", b"zwei"], [b"", b"\x00"]]
    np.testing.assert_array_equal(again[1].expected[5]["x"], PAYLOADS[5]["x"])
    assert again[0].fresh is not None
    assert again[0].fresh.make(3)["s"].tolist() == fresh.make(3)["s"].tolist()
    assert isinstance(answers, Answers)
    reference, tolerance = answers.references[3]
    assert (reference["y"].tolist(), tolerance) == ([0, 1, 2], 0.5)
    assert unpack(pack(Load(plan, parts))).answers is None


def test_a_plan_that_a_worker_cannot_do_is_an_error_of_ours(tmp_path: Path) -> None:
    plan = Plan("http://127.0.0.1:9", 1.0, trace=str(tmp_path / "none.csv"), workers=2, warmup=0.0)
    with pytest.raises(Exception, match="no such file") as caught:
        asyncio.run(_run(plan))
    assert type(caught.value).__name__ == "BadInput"


async def _run(plan: Plan) -> None:
    crew = workers.Crew(plan, workers.start)
    try:
        await crew.prepare(pack(Load(plan, [Part("double", PAYLOADS)])), lambda state: None)
        await crew.run(asyncio.get_running_loop().time(), None, lambda state: None)  # type: ignore[arg-type]
    finally:
        await crew.close()


def test_endings_are_added_up() -> None:
    ending = share.Ending()
    for seconds in (1.0, 3.0, 2.0):
        said = {"end": seconds, "gone": seconds == 3, "succeeded": 5, "errors": [["error", "x", 2]], "cpu": 0.5}
        said |= {"sending": seconds + 1, "lag": {"p99": seconds, "p999": None}}
        ending.add(said | {"checked": 4, "mismatches": [{"n": seconds}], "most": 10, "full": seconds})
    first = {"checked": 12, "mismatches": [{"n": 1}, {"n": 2}, {"n": 3}]}
    first |= {"sending": 4, "lag": {"p99": 3, "p999": None}, "most": 30, "full": 3}
    assert vars(ending) == {"end": 3, "gone": True, "succeeded": 15, "errors": {("error", "x"): 6}, "cpu": 1.5, **first}
