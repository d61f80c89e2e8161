"""More than one machine, as far as one machine shows it: workers apart, a cluster of one host, a manifest."""

import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.judge.merge import merge
from loadtest.judge.summary import summarize
from loadtest.load import ray_workers
from loadtest.load.deploy import job
from loadtest.plan.plan import Plan
from loadtest.record.results import read
from modelathe.errors import BadInput, UsageError
from tests.loadtest.report.test_report import SERVER

LOAD = ("digits", "--url", "grpc://triton:8001", "--rate", "8000", "--duration", "60s", "--version", "$(x) 'é'")


def loadtest(*args: object, timeout: float = 240) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "loadtest", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def run_apart(url: str, folder: Path, begin: float) -> list[Path]:
    """Run two workers of one plan, each as a program of its own."""
    moment = datetime.fromtimestamp(begin, UTC).isoformat()
    files = [folder / f"{index}.jsonl" for index in (0, 1)]
    options = ["--rate", "100", "--duration", "1s", "--warmup", "0s", "--workers", "2", "--begin-at", moment]
    command = [sys.executable, "-m", "loadtest", "run", "double", "--url", url, *options, "--allow-invalid", "--json"]
    programs = [
        subprocess.Popen(
            [*command, "--index", str(index), "--output", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, path in enumerate(files)
    ]
    for program in programs:
        _, err = program.communicate(timeout=120)
        assert program.returncode == 0, err
    return files


def test_workers_that_ran_apart_become_one_run(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        files = run_apart(server.http, tmp_path, time.time() + 15)
    assert [len(read(path).planned) for path in files] == [50, 50]
    whole = tmp_path / "whole.jsonl"
    done = loadtest("merge", *files, "--output", whole)
    assert done.returncode == 0, done.stderr
    results, document = read(whole), summarize(whole)
    np.testing.assert_allclose(results.planned, np.arange(100) / 100, atol=1e-6)
    assert document["requests"]["done"] == 100
    assert document["client_cores"] == 2
    assert document["plan"]["index"] is None
    # Both looked at the server's counts before the first request and after the last.
    assert document["server"]["success"] >= 50


def test_a_moment_that_is_over_sends_nothing(stand_in, tmp_path: Path) -> None:
    with stand_in() as server:
        done = loadtest(
            "run",
            "double",
            "--url",
            server.http,
            "--begin-at",
            "2020-01-01T00:00:00Z",
            "--output",
            tmp_path / "r.jsonl",
        )
        assert server.inferences == 0
    assert done.returncode == 5
    assert "was to begin" in done.stderr
    assert not (tmp_path / "r.jsonl").exists()


PART = {"model": "m", "version": "1", "payloads": 1, "batch": 1, "shapes": {"x": [1, 4]}, "weight": 1.0}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """What two workers leave; they differ in every figure, so that a sum is neither twice one of them nor the other."""
    paths = []
    for index in (0, 1):
        plan = {"duration": 1.0, "workers": 2, "index": index, "concurrency": 4, "rate": None}
        header = {"format": 1, "plan": plan, "model": "m", "url": "http://h:1", "parts": [PART]}
        row = {"n": index, "planned": 0.5, "sent": 0.5, "done": 0.6 + index, "verdict": "ok", "payload": 0}
        end = {
            "end": 1.0 + index,
            "client_cpu": 0.5 - 0.25 * index,
            "client_cores": 1 + index,
            "gone": index == 0,
            "server": SERVER | {"success": 7 - index},
        }
        end["errors"] = [
            {"verdict": "error", "text": "x", "count": 2 + index},
            {"verdict": ("timeout", "error")[index], "text": "y", "count": 1 + 8 * index},
        ]
        end["unknown"] = [f"what {index} asked", "what both asked"]
        wrong = {"n": 1 - index, "payload": 0, "output": "y", "index": None, "expected": "a", "got": "b"}
        end |= {"checked": 10 + index, "mismatches": [wrong]}
        end["backlog"] = {"most": 9 + index, "full": 2.0 - index}
        end["loop_lag_ms"] = {"p99": 1.0 - index, "p999": None if index else 2.0, "max": 3.0 + index}
        lines = [header, {"reading": 0.0, "server_cpu": 1.0}, row, end]
        paths.append(tmp_path / f"{index}.jsonl")
        paths[-1].write_text("".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines))
    return paths


def test_ends_are_put_together(two: list[Path], tmp_path: Path) -> None:
    merge(two, tmp_path / "whole")
    results = read(tmp_path / "whole")
    assert results.done.tolist() == [0.6, 1.6]
    assert len(results.readings) == 1
    assert results.end == {
        "end": 2.0,
        "client_cpu": 0.75,
        "client_cores": 3,
        "gone": True,
        "loop_lag_ms": {"p99": 1.0, "p999": 2.0, "max": 4.0},
        "backlog": {"most": 19, "full": 2.0},
        "errors": [
            {"verdict": "error", "text": "y", "count": 9},
            {"verdict": "error", "text": "x", "count": 5},
            {"verdict": "timeout", "text": "y", "count": 1},
        ],
        # Each file counts what all workers sent while it looked.
        "server": SERVER | {"success": 7},
        "unknown": ["what 0 asked", "what both asked", "what 1 asked"],
        "checked": 21,
        "mismatches": [
            {"n": n, "payload": 0, "output": "y", "index": None, "expected": "a", "got": "b"} for n in (0, 1)
        ],
    }


def test_what_does_not_belong_together(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="each worker of one run"):
        merge([two[0], two[0]], tmp_path / "whole")
    with pytest.raises(BadInput, match="workers 0 of 2"):
        merge(two[:1], tmp_path / "whole")
    text = two[1].read_text().splitlines(keepends=True)
    two[1].write_text("".join(text[:-1]))
    with pytest.raises(BadInput, match="interrupted"):
        merge(two, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    assert loadtest("merge", two[0], "--output", two[0]).returncode == 2


def changed(path: Path, place: int, **values: Any) -> None:
    """Change the first line of a file, or the last."""
    lines = path.read_text().splitlines()
    lines[place] = json.dumps(json.loads(lines[place]) | values)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"model_version": "2"},
        {"parts": [PART | {"shapes": {"x": [1, 5]}}]},
        {"parts": [PART | {"version": "2"}]},
        {"plan": {"duration": 1.0, "workers": 2, "index": 1, "concurrency": 5, "rate": None}},
    ],
)
def test_runs_of_other_loads_are_not_put_together(two: list[Path], other: dict[str, Any], tmp_path: Path) -> None:
    changed(two[1], 0, **other)
    [name] = other
    with pytest.raises(BadInput, match=f"1.jsonl: is of another run: {'concurrency' if name == 'plan' else name} of"):
        merge(two, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("cores", [None, 0, "two"])
def test_the_cores_of_a_client_are_never_guessed(two: list[Path], cores: Any, tmp_path: Path) -> None:
    changed(two[1], -1, client_cores=cores)
    for act in (lambda: merge(two, tmp_path / "whole"), lambda: summarize(two[1])):
        with pytest.raises(BadInput, match=r"1\.jsonl.*not that of a result file"):
            act()
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("values", [{"index": 2}, {"index": -1}, {"index": 0, "ray": "local"}])
def test_an_index_that_makes_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan("http://h:1", 1.0, rate=1.0, workers=2, **values)


def test_the_manifest_is_a_job_that_kubernetes_takes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    import yaml

    begin = datetime(2026, 11, 22, 21, 0, tzinfo=UTC)
    made = yaml.safe_load(job(LOAD, image="registry/modelathe", claim="results", pods=4, begin=begin))
    validate.validate(made, validate.latest_version(), strict=True)
    spec = made["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    args = spec["template"]["spec"]["containers"][0]["args"]
    assert args[: len(LOAD) + 1] == ["run", *LOAD[:-1], "$$(x) 'é'"]
    assert args[args.index("--index") + 1] == "$(JOB_COMPLETION_INDEX)"
    assert args[args.index("--begin-at") + 1] == "2026-11-22T21:00:00+00:00"


def test_the_manifest_command_checks_the_load() -> None:
    options = ("manifest", "--image", "i", "--claim", "c", "--pods", 2, "--json", "--")
    done = loadtest(*options, *LOAD)
    assert done.returncode == 0, done.stderr
    assert "kind: Job" in json.loads(done.stdout)["manifest"]
    for wrong, said in (
        (("digits",), "--url"),
        ((*LOAD, "--speeed", "3"), "--speeed"),
        ((*LOAD, "--rate", "0"), "rate"),
        ((*LOAD, "--workers=3"), "--workers is set by the manifest"),
    ):
        done = loadtest(*options, *wrong)
        assert done.returncode == 2, done.stdout
        assert said in done.stderr


@pytest.mark.parametrize("ahead", [-3000.0, 0.0, 12345.678])
def test_the_offset_of_a_clock_is_known_to_half_the_quickest_answer(ahead: float) -> None:
    rng = np.random.default_rng(0)

    async def ask() -> float:
        await asyncio.sleep(float(rng.uniform(0.001, 0.02)))
        there = time.monotonic() + ahead
        await asyncio.sleep(float(rng.uniform(0.001, 0.02)))
        return there

    offset, uncertainty = asyncio.run(ray_workers.offset_of(ask, rounds=10))
    assert abs(offset - ahead) <= uncertainty
    assert uncertainty < 1


def test_ray_that_is_not_installed_is_named(stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="ray is not installed"), ray_workers.hiring("local"):
        pass


@pytest.mark.slow
def test_a_load_over_ray_workers_on_this_machine(stand_in, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        done = loadtest(
            "run", "double", "--url", server.http, "--rate", 100, "--duration", "2s", "--workers", 2, "--ray", "local",
            "--tolerance", "1e-5", "--allow-invalid", "--json", "--output", path,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["requests"]["done"] == 200
    assert document["server"]["reconciled"]
    results = read(path)
    np.testing.assert_allclose(results.planned, np.arange(200) / 100, atol=1e-6)
    clocks = results.header["clocks"]
    assert [clock["worker"] for clock in clocks] == [0, 1]
    # One machine has one clock, and we must have found that out.
    assert all(abs(clock["offset"]) <= clock["uncertainty"] + 1e-3 for clock in clocks)
