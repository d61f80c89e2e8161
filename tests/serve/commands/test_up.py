"""`serve up` and `serve install` as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from modelathe.client import connect
from serve.server.tritonserver import wait
from tests.conftest import TINY
from tests.serve.server.test_server import eventually, group_is_gone, shared_memory

ROOT = Path(__file__).parents[3]
FREE = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def serve(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )


@contextmanager
def up(repository: Path, runtime: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run `serve up --json` and yield it, once ready, with its document; it must end inside the block."""
    command = [sys.executable, "-m", "serve", "up", str(repository), *FREE, "--json", *options]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, json.loads(_document(process))
        finally:
            process.kill()


def _document(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "}\n":
            break
    return "".join(lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_up_until_a_signal(model_repository: Path, server_prefix: Path, tmp_path: Path, number: int, code: int) -> None:
    with up(model_repository, tmp_path) as (process, ready):
        assert ready["models"] == [{"name": TINY, "versions": [1]}]
        with connect(ready["grpc"]) as client:
            assert client.infer(TINY, {"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 3)
        state = next((tmp_path / "modelathe").glob("server-*"))
        assert state.stat().st_mode & 0o777 == 0o600
        assert json.loads(state.read_text())["pid"] == ready["pid"]
        regions = shared_memory(ready["pid"])
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert group_is_gone(ready["pid"])
    assert regions
    assert not [path for path in regions if path.exists()]
    assert not list((tmp_path / "modelathe").iterdir())
    assert not Path(ready["log"]).exists()


def test_up_ends_when_the_server_dies(model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with up(model_repository, tmp_path, "--log", str(log), "--no-probe") as (process, ready):
        os.kill(ready["pid"], signal.SIGSEGV)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "tritonserver was killed by SIGSEGV" in said
    assert str(log) in said
    assert eventually(lambda: group_is_gone(ready["pid"]))


@pytest.mark.timed
def test_a_signal_that_another_thread_took_ends_the_waiting() -> None:
    def interrupt() -> None:
        # As when it arrives just before the call: the call itself is not interrupted.
        time.sleep(0.1)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    with subprocess.Popen(["sleep", "20"]) as process:
        begun = time.monotonic()
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            wait(SimpleNamespace(pid=process.pid))  # type: ignore[arg-type]
        took = time.monotonic() - begun
        process.kill()
    assert took < 10


@pytest.mark.timed
def test_interrupted_while_loading(model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "serve", "up", str(model_repository), *FREE, "--log", str(log)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert eventually(lambda: log.exists() and log.read_text().count("\n") > 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "interrupted"
    assert eventually(lambda: group_is_gone(int(log.read_text().split()[2])))


def test_up_prints_a_line_to_paste(model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "up", str(model_repository), *FREE]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ready, paste = process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert ready.startswith(f"ready: {TINY}, version 1, at grpc://127.0.0.1:")
    assert paste.strip().startswith(f"loadtest run {TINY} --url grpc://127.0.0.1:")
    assert process.returncode == 130


def test_up_over_a_file(tmp_path: Path, server_prefix: Path) -> None:
    (tmp_path / "file").write_text("")
    done = serve("up", str(tmp_path / "file"), "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["kind"] == "BadRepository"
    assert "is a file, not a model repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_without_an_installed_server(model_repository: Path, tmp_path: Path) -> None:
    done = serve("up", str(model_repository), env={"MODELATHE_SERVER": str(tmp_path / "none")})
    assert done.returncode == 5
    assert "serve install" in done.stderr


def test_up_refuses_a_port_that_is_none() -> None:
    done = serve("up", "x", "--http-port", "70000")
    assert done.returncode == 2


@pytest.mark.parametrize("command", ["install", "up"])
def test_help_has_an_example(command: str) -> None:
    done = serve(command, "--help")
    assert done.returncode == 0
    assert f"serve {command}" in done.stdout.partition("Example:")[2]
