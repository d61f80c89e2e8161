"""`serve watch` beside a real `serve up`."""

import dataclasses
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from modelathe.client import connect
from modelathe.errors import MachineError
from serve.commands import watch
from serve.server import state
from serve.server.endpoint import Endpoint
from serve.watch import metrics
from tests.conftest import TINY
from tests.serve.commands.test_up import ROOT, serve, up

HEADINGS = {"model", "req/s", "p50", "p95", "p99", "ms", "batch", "queue", "compute", "pending", "failed/s"}


@contextmanager
def load(url: str, model: str = TINY) -> Iterator[None]:
    """Send requests of two rows, one after the other, while the block lasts."""
    end = threading.Event()

    def send() -> None:
        with connect(url) as client:
            while not end.is_set():
                client.infer(model, {"x": np.ones((2, 4), np.float32)})

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.fixture(scope="module")
def own(
    model_repository: Path, server_prefix: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The environment of one `serve up`, and its document."""
    runtime = tmp_path_factory.mktemp("runtime")
    with up(model_repository, runtime, "--no-probe") as (process, ready):
        yield {"XDG_RUNTIME_DIR": str(runtime)}, ready
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@contextmanager
def watching(env: dict[str, str], *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "serve", "watch", "--interval", "200ms", *arguments]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def test_one_document(own: tuple[dict[str, str], dict[str, Any]]) -> None:
    env, ready = own
    with load(ready["grpc"]):
        done = serve("watch", "--interval", "500ms", "--count", "2", "--json", env=env)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert f"{said['url']}/metrics" == ready["metrics"]
    assert len(said["intervals"]) == 2
    for interval in said["intervals"]:
        (model,) = interval["models"]
        assert (model["model"], model["version"], model["batch"]) == (TINY, "1", 2)
        assert model["requests"] > 1
        assert 0 < model["quantiles_ms"]["0.5"] <= model["quantiles_ms"]["0.99"]
        assert min(model["queue_ms"], model["compute_ms"]) > 0
        assert not any(model["failures"].values())
        assert 2**20 < interval["memory"]["server_pss_bytes"] < interval["memory"]["machine_total_bytes"]


def test_plain_tables(own: tuple[dict[str, str], dict[str, Any]]) -> None:
    done = serve("watch", "--interval", "100ms", "--count", "2", env=own[0])
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.count(f"{TINY} 1 ") == done.stdout.count("MiB, all processes of the server") == 2
    assert set(done.stdout.split()) >= HEADINGS


@pytest.mark.timed
def test_on_a_terminal_of_80_columns_until_ctrl_c(own: tuple[dict[str, str], dict[str, Any]]) -> None:
    leader, follower = pty.openpty()
    env = {**own[0], "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    shown = ""
    with load(own[1]["grpc"]), watching(env, stdout=follower) as process:
        os.close(follower)
        while shown.count(f"{TINY} 1") < 2:
            shown += os.read(leader, 4096).decode()
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # so it says that nobody writes any more
            while piece := os.read(leader, 4096):
                shown += piece.decode()
        _, said = process.communicate(timeout=60)
    os.close(leader)
    assert (process.returncode, said.strip()) == (130, "interrupted")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in shown
    assert set(" ".join(lines).split()) >= HEADINGS


@pytest.mark.timed
def test_a_server_that_goes_away(model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with (
        up(model_repository, tmp_path, "--no-probe") as (process, ready),
        watching(env, stdout=subprocess.PIPE) as watcher,
    ):
        assert watcher.stdout
        assert watcher.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        _, said = watcher.communicate(timeout=60)
    assert watcher.returncode == 5
    first, *fix = said.splitlines()
    assert first.startswith(f"error: {ready['metrics']}: nothing answers")
    assert len(fix) == 1


def test_which_server(endpoint: Endpoint, tmp_path: Path) -> None:
    nobody = {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = serve("watch", "--json", env=nobody)
    assert done.returncode == 5
    assert json.loads(done.stdout)["error"]["what"] == "no server runs"
    # A server of somebody else's: its memory is not known, that of its machine is.
    done = serve("watch", "--url", endpoint.metrics, "--interval", "100ms", "--json", env=nobody)
    (interval,) = json.loads(done.stdout)["intervals"]
    assert interval["memory"]["server_pss_bytes"] is None
    assert "machine_used_bytes" in interval["memory"]
    assert "by whatever runs there" in serve("watch", "--url", endpoint.metrics, "--count", "1", env=nobody).stdout


def test_one_of_several_servers_must_be_chosen(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(endpoint, metrics="http://127.0.0.1:1")
    both = [state.Running(server, tmp_path, os.getpid()) for server in (endpoint, other)]
    monkeypatch.setattr(state, "everything", lambda: both)
    with pytest.raises(MachineError, match="several servers run") as raised:
        watch._found(None)
    assert f"{endpoint.metrics}, {other.metrics}" in raised.value.fix
    assert watch._found(f"{endpoint.metrics}/metrics") == (endpoint.metrics.removeprefix("http://"), both[0])
    assert watch._found("127.0.0.1:2") == ("127.0.0.1:2", None)


def test_a_long_name_and_long_numbers_fit_into_80_columns() -> None:
    name = "a_sentence_embedding_model_with_a_very_long_name"
    rates = metrics.Rates(name, "12", 12345.6, {"OTHER": 1234.5}, 128, 1234.5, 1234.5, {"0.99": 12345.6}, 1234)
    memory = {"server_pss_bytes": None, "machine_used_bytes": 2**40, "machine_total_bytes": 2**41}
    console = Console(width=80, file=io.StringIO())
    console.print(watch._view("127.0.0.1:8002", [rates], memory))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert {"12,346", "128", "1,234", "1234"} <= set(shown.split())
    assert f"{name} 12 failed: OTHER 1,234/s" in shown


@pytest.mark.parametrize("width", [48, 60, 79])
def test_a_narrow_terminal_gets_fewer_columns_and_the_name(width: int) -> None:
    rates = metrics.Rates("digits_cnn", "1", 12345.6, {"OTHER": 1234.5}, 128, 1234.5, 1234.5, {"0.99": 12345.6}, 1234)
    memory = {"server_pss_bytes": 2**27}
    console = Console(width=width, file=io.StringIO())
    console.print(watch._view("127.0.0.1:8002", [rates], memory, width))
    shown = console.file.getvalue()
    assert "…" not in shown
    assert "digits_cnn 1 " in shown
    assert {"req/s", "p99", "batch", "queue", "failed/s", "12,346", "1,234"} <= set(shown.split())


@pytest.mark.parametrize("wrong", [("--interval", "1ms"), ("--count", "0"), ("--url", "grpc://127.0.0.1:8001")])
def test_wrong_options(wrong: tuple[str, str]) -> None:
    assert serve("watch", *wrong).returncode == 2
