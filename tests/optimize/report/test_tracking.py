"""Runs in MLflow: a real tracking server on loopback, a local database, and trackers that are away."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from modelathe.commandline import install_line
from optimize.report import tracking
from tests.optimize.conftest import SMALL, Optimize

SOURCE = f"{SMALL}:workload"
RECIPE = """
[budget]
max_drop = 0.5
{budget}
[target]
cores = 1
batch = [1, 8]
[[step]]
use = "export.onnx"
[[step]]
use = "quantize.weight_only"
block_size = "32"
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("each_step_faster")]


def recipe(place: Path, budget: str = "") -> Path:
    path = place / "recipe.toml"
    path.write_text(RECIPE.format(budget=budget))
    return path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server, MLflow keeps artifacts in the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's without a run: its tables take a while to make."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    with tracking._quiet():
        tracking._client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def server(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own server with a database and a folder for artifacts, on this machine alone."""
    place, port = tmp_path_factory.mktemp("mlflow"), free_port()
    shutil.copy(empty, place / "runs.db")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{place}/runs.db", "--artifacts-destination", str(place / "artifacts")]
    log = (place / "log").open("w")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(
        [*command, *stores], stdout=log, stderr=log, cwd=place, env=environment, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            assert process.poll() is None, (place / "log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
        log.close()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return _asked(url, "GET", "/health")[0] == 200
    return False


def _asked(url: str, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()


def asked(url: str, question: str) -> Any:
    """Ask the server itself, over its REST interface."""
    status, body = _asked(url, "GET", f"/api/2.0/mlflow/{question}")
    assert status == 200, body
    return json.loads(body)


def test_a_run_stands_in_mlflow(server: str, tmp_path: Path, optimize: Optimize) -> None:
    output = tmp_path / "run"
    ended = optimize(
        "run", SOURCE, "--recipe", recipe(tmp_path), "--output", output, "--track", f"mlflow:{server}", "--json"
    )
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    told = document["tracking"]
    assert (told["uri"], told["error"]) == (server, "")
    run = asked(server, f"runs/get?run_id={told['run']}")["run"]
    assert run["info"]["status"] == "FINISHED"
    assert (
        asked(server, f"experiments/get?experiment_id={run['info']['experiment_id']}")["experiment"]["name"]
        == (document["workload"])
    )

    params = {one["key"]: one["value"] for one in run["data"]["params"]}
    assert params["workload"] == document["workload"]
    assert params["budget.max_drop"] == "0.5"
    assert (params["step.1.use"], params["step.2.use"]) == ("export.onnx", "quantize.weight_only")
    assert params["step.2.block_size"] == "32"
    assert params["target.batch"] == "[1, 8]"
    assert params["modelathe"] == document["modelathe"]
    assert params["torch"] == document["environment"]["torch"]

    tags = {one["key"]: one["value"] for one in run["data"]["tags"]}
    assert tags["folder"] == str(output)
    assert (
        tags["digest: 2-quantize.weight_only"]
        == json.loads((output / "digests.json").read_text())["2-quantize.weight_only"]
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=SMALL.parent, capture_output=True, text=True)
    if commit.returncode == 0:  # a checkout, not an unpacked archive
        assert tags["mlflow.source.git.commit"] == commit.stdout.strip()

    assert history(server, told["run"], "accuracy") == {
        0: document["trained"]["quality"]["value"],
        1: document["steps"][0]["quality"]["value"],
        2: document["steps"][1]["quality"]["value"],
    }
    assert history(server, told["run"], "accuracy.low")[2] == document["steps"][1]["quality"]["low"]
    assert history(server, told["run"], "bytes")[2] == document["steps"][1]["cost"]["bytes"]
    assert history(server, told["run"], "ratio.throughput.batch_8") == {
        place: step["ratios"]["throughput"]["8"] for place, step in enumerate(document["steps"], 1)
    }
    for gate in document["gates"]:
        name = tracking._name(f"gate: {gate['name']}")
        assert history(server, told["run"], name) == {2: float(gate["passed"])}
        assert tags[name].startswith("passed: ")

    def listed(folder: str) -> set[str]:
        found = asked(server, f"artifacts/list?run_id={told['run']}&path={folder}").get("files", [])
        return {one["path"] for one in found}

    assert {"report.html", "run.json", "recipe.toml", "bundle"} <= listed("")
    assert {"bundle/bundle.json", "bundle/model.onnx", "bundle/weights.safetensors"} <= listed("bundle")


def history(server: str, run: str, metric: str) -> dict[int, float]:
    name = quote(metric)
    found = asked(server, f"metrics/get-history?run_id={run}&metric_key={name}")["metrics"]
    return {int(one.get("step", 0)): one["value"] for one in found}


def test_a_refused_run_stands_there_too(empty: Path, tmp_path: Path, optimize: Optimize) -> None:
    """Into a local database, without a server."""
    store = f"sqlite:///{shutil.copy(empty, tmp_path / 'runs.db')}"
    ended = optimize(
        "run", SOURCE, "--recipe", recipe(tmp_path, "bytes = 1"), "--output", tmp_path / "run", "--track",
        f"mlflow:{store}",
    )  # fmt: skip
    assert ended.code == 3, ended.err
    assert f"of experiment small at {store}" in ended.out
    with tracking._quiet():
        client = tracking._client(store)
        (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.metrics["gate: size"] == 0
    assert run.data.tags["gate: size"].startswith("refused: ")


def test_a_tracker_that_is_away_is_found_before_the_work(tmp_path: Path, optimize: Optimize) -> None:
    output = tmp_path / "run"
    url = f"http://user:secret@127.0.0.1:{free_port()}"
    ended = optimize(
        "run", SOURCE, "--recipe", recipe(tmp_path), "--output", output, "--track", f"mlflow:{url}", "--json"
    )
    assert ended.code == 5
    error = json.loads(ended.out)["error"]
    assert error["what"].startswith("the tracker cannot be used: ")
    assert "without --track" in error["fix"]
    assert "secret" not in ended.out + ended.err
    assert not output.exists()


def test_a_tracker_that_fails_at_the_end_costs_no_result(
    tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    made = tracking._Run._log

    def gone(run: tracking._Run, document: dict[str, Any]) -> None:
        """The database is lost while the run goes on."""
        run.client._tracking_client.store.engine.dispose()
        for file in store.iterdir():
            file.unlink()
        made(run, document)

    monkeypatch.setattr(tracking._Run, "_log", gone)
    arguments = (
        "--recipe",
        recipe(tmp_path),
        "--output",
        tmp_path / "run",
        "--track",
        f"mlflow:sqlite:///{store}/a.db",
    )
    ended = optimize("run", SOURCE, *arguments)
    assert ended.code == 0, ended.err
    assert "warning: not tracked at sqlite:" in ended.out.replace("\n", " ")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("uri", ["wandb", "mlflows:x", ""])
def test_another_tracker_is_a_wrong_option(uri: str, tmp_path: Path, optimize: Optimize) -> None:
    ended = optimize("run", SOURCE, "--recipe", recipe(tmp_path), "--track", uri)
    assert ended.code == 2
    assert "say mlflow" in ended.err


def test_without_the_extra_one_line_installs_it(
    tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tracking.extra.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.extra.importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else found(name, *rest)
    )
    ended = optimize("run", SOURCE, "--recipe", recipe(tmp_path), "--output", tmp_path / "run", "--track", "mlflow")
    assert ended.code == 5
    assert install_line("mlflow") in ended.err
    assert not (tmp_path / "run").exists()


def test_nobody_else_is_told(empty: Path, tmp_path: Path) -> None:
    """MLflow asks whether it may tell its makers of its use when it is imported; then it is off already."""
    shutil.copy(empty, tmp_path / "a.db")
    code = (
        "from optimize.report import tracking\n"
        f"client = tracking._client('sqlite:///{tmp_path}/a.db')\n"
        "from mlflow.telemetry.client import get_telemetry_client\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(is_telemetry_disabled(), get_telemetry_client())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[-2] == "True None", done.stderr
