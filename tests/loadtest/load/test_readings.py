import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loadtest.judge import breakdown
from loadtest.judge.summary import load_file
from loadtest.load import drive
from loadtest.load.metrics import samples
from loadtest.load.readings import Readings, metrics_place, parse
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import Flight, Writer, read
from loadtest.report import charts
from tests.conftest import TINY, TINY_INPUTS

PAGE = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="a",version="1"} 30
nv_inference_request_success{model="a",version="2"} 10
nv_inference_request_success{model="other",version="1"} 500
nv_inference_queue_duration_us{model="a",version="1"} 2000000
nv_cpu_utilization 0.25
nv_cpu_memory_used_bytes 1073741824
nv_gpu_utilization{gpu_uuid="A"} 0.5
nv_gpu_utilization{gpu_uuid="B"} 0.7
nv_gpu_memory_used_bytes{gpu_uuid="A"} 100
nv_gpu_memory_used_bytes{gpu_uuid="B"} 50
nv_pinned_memory_pool_used_bytes 0
"""


def test_a_page_of_metrics() -> None:
    assert parse(PAGE, {"a"}) == {
        "success": 40,
        "queue_s": 2,
        "machine_cpu": 0.25,
        "machine_memory": 2**30,
        "gpu": pytest.approx(0.6),
        "gpu_memory": 150,
    }


def test_what_is_no_page_of_metrics() -> None:
    with pytest.raises(ValueError, match="not the metrics"):
        parse("<html>hello</html>", {"a"})


def test_labels_hold_any_letters() -> None:
    page = 'nv_x{model="a} 1",reason="\\"no\\""} 2\nnv_xy 3\n'
    assert list(samples(page)) == [("nv_x", {"model": "a} 1", "reason": '\\"no\\"'}, 2), ("nv_xy", {}, 3)]
    assert [name for name, _, _ in samples(page, ["nv_x"])] == ["nv_x"]


@pytest.mark.parametrize(
    ("url", "metrics", "place"),
    [
        ("http://h:8000", None, ("h", 8002)),
        ("grpc://h:8001", None, ("h", 8002)),
        ("http://h:9000", None, None),
        ("http://h:9000", "http://g:9", ("g", 9)),
    ],
)
def test_where_the_metrics_are(url: str, metrics: str | None, place: tuple[str, int] | None) -> None:
    assert metrics_place(url, metrics) == place


@pytest.mark.timed
@pytest.mark.parametrize("load", [{"concurrency": 4}, {"concurrency": 4, "workers": 2}], ids=["alone", "workers"])
def test_a_real_server_is_read_during_a_run(endpoint, load: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    parts = [Part(TINY, payload.generate(TINY_INPUTS, 4, 0, batch=2))]
    drive.run(Plan(endpoint.grpc, 3.2, warmup=0.0, metrics=endpoint.metrics, **load), parts, path)
    results, values = load_file(path)
    assert len(results.readings) >= 3
    for key in ("machine_cpu", "machine_memory", "server_memory", "success", "queue_s", "compute_infer_s"):
        at, found = breakdown.column(results, key)
        assert len(at) >= 3, key
        assert (found >= 0).all()
    assert breakdown.column(results, "server_cpu")[1].max() > 0
    assert breakdown.column(results, "server_memory")[1].max() > 2**24
    assert (np.diff(breakdown.column(results, "success")[1]) > 0).all()
    spent = breakdown.stages(results)
    assert spent is not None
    assert np.nanmean(spent["compute_infer"]) > 0
    batches = values["server"]["batches"]
    assert sum(batches.values()) == values["server"]["executions"]
    # Requests of two samples make batches of even sizes only.
    assert all(int(size) % 2 == 0 for size in batches)
    titles = [chart["title"] for chart in charts.charts(results, values)]
    for title in ("Batches really formed", "Where the time goes, over the run", "Processor of the server's machine"):
        assert title in titles


def test_metrics_that_nobody_has_are_left_out(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        parts = [Part("double", [{"x": np.ones((1, 4), np.float32)}])]
        plan = Plan(server.http, 1.3, concurrency=1, warmup=0.0, metrics=server.http)
        drive.run(plan, parts, tmp_path / "r.jsonl")
    results = read(tmp_path / "r.jsonl")
    # The stand-in runs in this process, which may be looked at.
    assert all("success" not in row and row["server_memory"] > 0 for row in results.readings)
    assert results.readings


def test_the_processes_of_a_server_are_found(stand_in) -> None:
    with stand_in() as server:
        found = Readings(server.http, {"double"}).processes
    assert os.getpid() in [process.pid for process in found]
    assert Readings("http://192.0.2.1:8000", {"double"}).processes == []


def test_a_process_that_ends_is_no_failure() -> None:
    async def some() -> list[dict[str, Any]]:
        readings, rows = Readings("http://127.0.0.1:9", set()), []
        child = await asyncio.create_subprocess_exec("sleep", "60")
        readings.processes = [psutil.Process(child.pid)]
        task = asyncio.create_task(readings.run(asyncio.get_running_loop().time(), rows.append))
        await asyncio.sleep(0.2)
        child.kill()
        await child.wait()
        await asyncio.sleep(1.2)
        task.cancel()
        return rows

    rows = asyncio.run(some())
    assert rows[0]["server_memory"] > 0
    assert rows[-1]["server_memory"] == 0


def test_the_split_over_time_from_two_readings(tmp_path: Path) -> None:
    first = {"success": 0, **dict.fromkeys([f"{stage}_s" for stage in (*breakdown.STAGES, "request")], 0.0)}
    then = {"success": 10, "queue_s": 0.01, "compute_input_s": 0.0, "compute_infer_s": 0.04, "compute_output_s": 0.0}
    header = {"plan": {"duration": 2.0, "concurrency": None}, "model": "m", "url": "grpc://h:1"}
    with Writer(tmp_path / "r", header) as writer:
        writer.reading({"reading": 0.0, **first})
        for n in range(10):
            writer.add(Flight(n, n / 10, 0, n / 10, n / 10 + 0.02))
        writer.reading({"reading": 1.0, **then, "request_s": 0.06})
        writer.finish({"end": 1.0})
    spent = breakdown.stages(read(tmp_path / "r"))
    assert spent is not None
    found = {stage: float(values[0]) for stage, values in spent.items()}
    assert found == pytest.approx(
        {"at": 0.5, "queue": 1, "compute_input": 0, "compute_infer": 4, "compute_output": 0, "other": 1, "network": 14}
    )
