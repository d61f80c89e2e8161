"""The main job, end to end, on the small workload: a real server, real HTTP and gRPC."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modelathe.client import connect
from optimize.runs import pipeline, recipe
from optimize.source.load import load_workload
from serve.repository import tree as repository
from serve.server import control, state
from serve.server import tritonserver as server
from tests.optimize.conftest import SMALL, Optimize

SOURCE = f"{SMALL}:workload"
RECIPE = """
[budget]
max_drop = 0.05
[target]
cores = 2
batch = [1, 8]
[[step]]
use = "prune.channels"
ratio = 0.25
[[step]]
use = "distill.logits"
epochs = 3
[[step]]
use = "quantize.static"
[load]
duration = 0.3
concurrency = 2
"""
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("each_step_faster")]


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, server_prefix: Path, each_step_faster: None
) -> dict[str, object]:
    """One whole run, published; the folder is in `place`."""
    place = tmp_path_factory.mktemp("run")
    (place / "recipe.toml").write_text(RECIPE)
    document = pipeline.run(
        recipe.load(place / "recipe.toml"),
        load_workload(SOURCE),
        output=place / "run",
        repository=place / "repository",
    )
    return {**document, "place": place}


def test_the_document_has_every_key(finished: dict[str, object]) -> None:
    document = json.loads(json.dumps(finished, default=str))
    assert document["format"] == 1
    assert [step["name"] for step in document["steps"]] == [
        "prune.channels",
        "distill.logits",
        "export.onnx",
        "quantize.static",
    ]
    for entry in (document["trained"], *document["steps"], document["result"]):
        assert set(entry["quality"]) == {"metric", "value", "low", "high", "samples", "higher_is_better"}
        assert entry["also"][0]["metric"] == "agreement"
        assert set(entry["cost"]) == {"bytes", "parameters", "macs", "latency_ms", "throughput"}
        assert set(entry["cost"]["latency_ms"]) == set(entry["cost"]["throughput"]) == {"1", "8"}
    assert set(document["endpoint"]["parity"]) >= {"requests", "mismatched", "max_abs_diff", "tolerance"}
    for entry in (document, *document["steps"]):
        assert set(entry["ratios"]) >= {"size", "latency", "throughput", "interval", "verdict", "before", "control"}
        assert entry["ratios"]["verdict"] == dict.fromkeys(("1", "8"), "not slower")
        assert entry["ratios"]["control"]["8"]["value"] == pytest.approx(1)
        assert entry["ratios"]["before"]["1"]["value"] == pytest.approx(1 / 0.9)
    assert document["ratios"] == document["steps"][-1]["ratios"]
    assert document["ratios"]["throughput"]["8"] == pytest.approx(0.9**-4)
    assert document["warnings"] == []
    gates = [set(gate) for gate in document["gates"]]
    assert all(keys >= {"name", "passed", "measured", "limit", "advice"} for keys in gates)
    assert document["load"]["valid"]
    assert document["version"]["number"] == 1
    assert (document["version"]["state"], document["comparison"]) == ("live", None)


def test_the_result_is_smaller_and_the_endpoint_is_the_bundle(finished: dict[str, object]) -> None:
    document = json.loads(json.dumps(finished, default=str))
    assert document["ratios"]["size"] > 2
    assert document["result"]["cost"]["parameters"] < document["trained"]["cost"]["parameters"]
    assert document["endpoint"]["quality"]["value"] == document["result"]["quality"]["value"]
    assert document["endpoint"]["parity"]["mismatched"] == 0
    assert document["places"]["endpoint"] == document["endpoint"]["quality"]
    assert document["places"]["torch"] == document["steps"][1]["quality"]


def test_what_was_published_serves_and_says_whence(finished: dict[str, object], optimize: Optimize) -> None:
    place = Path(str(finished["place"]))
    lineage = json.loads((place / "repository" / "small" / "1" / "lineage.json").read_text())
    assert lineage["forced"] is False
    assert [entry["name"] for entry in lineage["lineage"]][-1] == "quantize.static"
    # Its call takes less than a millisecond, in which two threads wait for each other more than they help.
    config = repository.config(place / "repository", "small")
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    with server.running(place / "repository", grace=0) as endpoint:
        for url in (endpoint.grpc, endpoint.http):
            with connect(url) as client:
                assert client.ready("small")
            ended = optimize("evaluate", finished["bundle"], "--endpoint", f"{url}/small", "--json")
            assert ended.code == 0
            served = json.loads(ended.out)
            assert served["predictor"] == "endpoint"
            assert served["quality"]["value"] == pytest.approx(finished["result"]["quality"]["value"])  # type: ignore[index]
        missing = optimize("evaluate", finished["bundle"], "--endpoint", f"{endpoint.grpc}/small/7")
        assert missing.code == 4


def test_each_command_alone_on_the_bundles(finished: dict[str, object], optimize: Optimize) -> None:
    bundle = str(finished["bundle"])
    shown = optimize("show", bundle)
    assert shown.code == 0
    assert "4. quantize.static" in shown.out
    compared = json.loads(optimize("compare", SOURCE, bundle, "--json").out)
    assert set(compared) >= {"difference", "low", "high", "flipped"}
    assert len(compared["flipped"]) >= abs(compared["difference"]) * 397 - 1e-9
    torch_side = json.loads(optimize("evaluate", bundle, "--predictor", "torch", "--json").out)
    onnx_side = json.loads(optimize("evaluate", bundle, "--json").out)
    assert (torch_side["predictor"], onnx_side["predictor"]) == ("torch", "onnx")
    again = optimize("prune", bundle, "--output", Path(str(finished["place"])) / "again")
    assert again.code == 2
    assert "out of order" in again.err


def test_a_second_run_resumes_and_publishes_the_next_version(
    finished: dict[str, object], optimize: Optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = Path(str(finished["place"]))
    arguments = ("--recipe", place / "recipe.toml", "--output", place / "run", "--repository", place / "repository")
    with state.claimed(place / "repository") as ready, server.running(place / "repository", grace=0) as endpoint:
        ready(endpoint)
        ended = optimize("run", SOURCE, *arguments)
        assert ended.code == 0, ended.err
        assert control.versions(endpoint.http, "small") == [1], "nothing is promoted unasked"
        assert "candidate: small version 2" in ended.out and "beside version 1, which was live:" in ended.out
        line = next(line for line in ended.out.splitlines() if line.startswith("promote it with: "))
        assert line.endswith(f"promote small 2 --repository {place / 'repository'}")
        promoted = subprocess.run(shlex.split(line.partition(": ")[2]), capture_output=True, text=True)
        assert promoted.returncode == 0, promoted.stderr
        assert control.versions(endpoint.http, "small") == [2]
        ended = optimize("run", SOURCE, *arguments, "--promote", "--json")
        assert ended.code == 0, ended.err
        assert control.versions(endpoint.http, "small") == [3]
    document = json.loads(ended.out)
    assert document["resumed"] is True
    assert (document["version"]["number"], document["version"]["state"]) == (3, "live")
    assert document["version"]["url"] == endpoint.http
    assert document["comparison"]["number"] == 2
    assert document["comparison"]["quality"]["difference"] == 0
    assert document["comparison"]["answers"]["labels"] == 0
    assert document["comparison"]["better"] == []
    assert "kept from the last run" in ended.err
    (place / "other.toml").write_text(RECIPE.replace("0.25", "0.3"))
    ended = optimize("run", SOURCE, "--recipe", place / "other.toml", "--output", place / "run", "--json")
    assert ended.code == 2
    assert "holds another run, which stays: what differs is recipe" in ended.err
    assert (place / "run" / "report.html").is_file()


def test_the_proof_goes_with_the_version(finished: dict[str, object]) -> None:
    place = Path(str(finished["place"])) / "repository"
    page = (place / "small" / "1" / "report.html").read_text()
    lineage = json.loads((place / "small" / "1" / "lineage.json").read_text())
    assert repository.total(lineage["digests"]) in page
    assert "load.html" not in page, "which does not lie beside it"
    command = [sys.executable, "-m", "serve", "why", "small", "1", "--repository", place]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for text in ("made of: run ", "done, with accuracy after each step", "lost: accuracy ", "won: ", "× smaller"):
        assert text in said
    assert f"page: {place / 'small' / '1' / 'report.html'}" in said
    checked = subprocess.run([*command[:3], "check", "--repository", place], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_killed_run_resumes_where_it_stopped(recipe_file: Path, tmp_path: Path, optimize: Optimize) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "optimize", "run", SOURCE, "--recipe", recipe_file, "--output", output]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (output / "1-prune.channels").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    stamp = (output / "1-prune.channels" / "bundle.json").stat().st_mtime_ns
    ended = optimize("run", SOURCE, "--recipe", recipe_file, "--output", output, "--json")
    assert ended.code == 0, ended.err
    assert "prune.channels: kept from the last run" in ended.err
    assert (output / "1-prune.channels" / "bundle.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_cleanly(recipe_file: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "optimize", "run", SOURCE, "--recipe", recipe_file, "--output", output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("prune.channels"):
                break
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert all((folder / "bundle.json").is_file() for folder in output.glob("[0-9]-*"))
    assert not list(output.glob(".*"))


def test_a_gate_says_no_with_exit_code_3_and_force_overrules(
    tmp_path: Path, optimize: Optimize, server_prefix: Path
) -> None:
    hard = tmp_path / "hard.toml"
    hard.write_text("[budget]\nmax_drop = 0.0\nbytes = 10\n[target]\nbatch = [1]\n[[step]]\nuse = 'prune.channels'\n")
    arguments = ("run", SOURCE, "--recipe", hard, "--output", tmp_path / "run", "--repository", tmp_path / "repository")
    ended = optimize(*arguments, "--json")
    assert ended.code == 3
    document = json.loads(ended.out)
    assert document["error"]["exit"] == 3
    assert document["error"]["fix"]
    refused = [gate for gate in document["gates"] if not gate["passed"]]
    assert {gate["name"] for gate in refused} >= {"size"}
    assert all(gate["advice"] for gate in refused)
    assert not (tmp_path / "repository").exists() or not any((tmp_path / "repository").iterdir())
    ended = optimize(*arguments, "--force", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["version"]["forced"] is True
    lineage = json.loads((tmp_path / "repository" / "small" / "1" / "lineage.json").read_text())
    assert lineage["forced"] is True


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (("return self.out(", "if not self.training: return (image, 1)\n        return self.out("), 4, "returns tuple"),
        (("return self.out(", "if not self.training: return {'a': 1}\n        return self.out("), 4, "returns a dict"),
        (("def forward(self, image: ", "def forward(self, other: int, image: "), 4, "required positional argument"),
        (("IMAGES = (IMAGES", "IMAGES[1500, 3] = np.nan\nIMAGES = (IMAGES"), 4, "NaN"),
        (("        training=lambda: batches(TRAIN),\n", ""), 4, "needs the workload's training"),
    ],
)
def test_bad_workloads_end_in_one_line(
    user_file: Callable[..., str],
    recipe_file: Path,
    tmp_path: Path,
    optimize: Optimize,
    change: tuple[str, str],
    code: int,
    said: str,
) -> None:
    source = user_file(change)
    ended = optimize("run", source, "--recipe", recipe_file, "--output", tmp_path / "run")
    assert ended.code == code, ended.err
    assert said in ended.err
    assert "fix:" in ended.err


def test_a_relative_budget_for_an_unbounded_metric(
    user_file: Callable[..., str], tmp_path: Path, optimize: Optimize
) -> None:
    path = tmp_path / "relative.toml"
    path.write_text("[budget]\nkeep = 0.99\n[[step]]\nuse = 'prune.channels'\n")
    source = user_file(("        bounded=True,\n", ""))
    ended = optimize("run", source, "--recipe", path, "--output", tmp_path / "run")
    assert ended.code == 2
    assert "metric in [0, 1]" in ended.err


def test_a_repository_that_is_a_file(
    recipe_file: Path, tmp_path: Path, optimize: Optimize, server_prefix: Path
) -> None:
    (tmp_path / "repository").write_text("not a folder")
    arguments = ("--recipe", recipe_file, "--output", tmp_path / "run", "--repository", tmp_path / "repository")
    ended = optimize("run", SOURCE, *arguments)
    assert ended.code == 4
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_no_half_bundle(recipe_file: Path, tmp_path: Path, optimize: Optimize) -> None:
    small = tmp_path / "disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        ended = optimize("run", SOURCE, "--recipe", recipe_file, "--output", small / "run")
        assert ended.code == 5, ended.err
        assert "disk is full" in ended.err
        assert all((folder / "bundle.json").is_file() for folder in (small / "run").glob("[0-9]-*"))
    finally:
        subprocess.run(["umount", small], check=True)
