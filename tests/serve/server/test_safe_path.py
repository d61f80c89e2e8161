"""Every Python process that we start runs our modules, also from a folder whose files have the names of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadtest.selftest import nullserver
from modelathe import interpreter
from modelathe.client import connect
from serve.server import install
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_WEIGHT
from tests.serve.commands.test_up import FREE, ROOT

NAMES = (
    *("serve", "loadtest", "optimize", "numpy", "onnxruntime", "json", "pip", "venv", "click"),
    *("binding", "complete", "graph", "instance", "model", "triton_python_backend_utils"),
)
STARTERS = {
    "modelathe/interpreter.py",
    "serve/server/install.py",  # with PYTHONSAFEPATH
    "serve/server/tritonserver.py",  # isolated, from the folder of the server's environment
    "optimize/tensorrt/plan.py",  # a script of ours by its path
}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which every module that we start or import has a namesake."""
    folder = tmp_path / "callers"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the caller is run: {name}')\n")
    monkeypatch.chdir(folder)
    # An empty entry stands for the current folder too.
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}{os.environ.get('PYTHONPATH', '')}{os.pathsep}")
    return folder


def test_the_backend_processes(hostile: Path, model_repository: Path, server_prefix: Path) -> None:
    x = np.ones((1, 4), np.float32)
    with running(model_repository, grace=0) as endpoint, connect(endpoint.grpc) as client:
        np.testing.assert_allclose(client.infer(TINY, {"x": x})["y"], x @ TINY_WEIGHT, rtol=1e-6)


def test_a_detached_server(hostile: Path, model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path)}
    ours = [sys.executable, "-P", "-m", "serve"]

    def serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*ours, *arguments], env=env, capture_output=True, text=True, check=False)

    started = serve("up", str(model_repository), *FREE, "--detach", "--json")
    assert started.returncode == 0, started.stdout + started.stderr
    try:
        assert json.loads(started.stdout)["models"] == [{"name": TINY, "versions": [1]}]
    finally:
        assert serve("down").returncode == 0


def test_helpers_of_a_load(hostile: Path) -> None:
    with nullserver.running() as null, connect(null.http) as client:
        assert client.ready(null.model)
        command = interpreter.command("loadtest.load.memory", str(null.pid), "0.01")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": interpreter.variables()}
        with subprocess.Popen(command, **pipes) as sampler:
            assert len(sampler.stdout.readline().split()) == 2
            sampler.stdin.close()


def test_workers_of_a_load(hostile: Path) -> None:
    with nullserver.running() as null:
        command = [*interpreter.command("loadtest"), "run", null.model, "--url", null.http, "--workers", "2"]
        done = subprocess.run(
            [*command, "--duration", "300ms", "--warmup", "0s", "--allow-invalid", "--json"],
            env=interpreter.variables(),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["requests"]["done"] > 0


def test_installing(hostile: Path) -> None:
    for asked in (("-m", "pip", "--version"), ("-m", "venv", "--help"), ("-c", "import numpy, json")):
        install._run([sys.executable, *asked], "it does not run", "")


@pytest.mark.parametrize("room", ["optimize", "serve", "loadtest"])
def test_console_scripts(hostile: Path, room: str) -> None:
    script = Path(sys.executable).with_name(room)
    if not script.exists():
        pytest.skip(f"{room} is not installed beside {sys.executable}")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([script, "--help"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, "Usage:" in done.stdout) == (0, True), done.stderr


def test_no_other_module_starts_python() -> None:
    found = {
        str(path.relative_to(ROOT))
        for room in ("modelathe", "optimize", "serve", "loadtest")
        for path in (ROOT / room).rglob("*.py")
        if "sys.executable" in path.read_text()
    }
    assert found == STARTERS
