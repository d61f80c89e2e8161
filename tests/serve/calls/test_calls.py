"""`serve.up` and `serve.add`, with the real server."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import serve
from modelathe.client import connect
from modelathe.errors import MachineError, UsageError
from serve.repository import staging
from serve.server import detach, state
from tests.conftest import TINY, TINY_WEIGHT, save_tiny


@pytest.fixture
def place(tmp_path: Path, publish_tiny: Callable[..., staging.Version]) -> Path:
    place = tmp_path / "repository"
    publish_tiny(place)
    return place


def test_a_model_is_added_served_and_added_to_while_it_is_served(
    place: Path, tmp_path: Path, server_prefix: Path
) -> None:
    onnx = save_tiny(tmp_path / "twice.onnx", 2 * TINY_WEIGHT)
    with serve.up(place) as server:
        assert server.models == (TINY,)
        assert server.document["grpc"] == server.grpc
        assert server.grpc in server._repr_html_()
        with connect(server.grpc) as client:
            answer = client.infer(TINY, {"x": np.ones((1, 4), np.float32)})
        np.testing.assert_allclose(answer["y"], TINY_WEIGHT.sum(0)[None], rtol=1e-5)
        added = serve.add(onnx, place, name="twice", settings={"queue_delay_us": 300}, cores=1, quiet=True)
        assert (added.model, added.number, added.state, added.url) == ("twice", 1, "live", server.http)
        with connect(server.http) as client:
            answer = client.infer("twice", {"x": np.ones((1, 4), np.float32)})
        np.testing.assert_allclose(answer["y"], 2 * TINY_WEIGHT.sum(0)[None], rtol=1e-5)
        (running,) = [running for running in state.everything() if running.repository == place.resolve()]
        with pytest.raises(MachineError, match="belongs to a Python program"):
            detach.stop(running)
        with pytest.raises(MachineError, match="is served already"), serve.up(place):
            pass
    assert not Path(f"/proc/{server.pid}").exists()
    assert not [running for running in state.everything() if running.repository == place.resolve()]
    later = serve.add(onnx, place, name=TINY, check=False, quiet=True)
    assert (later.state, later.url, later.untried) == ("staged", None, "not tried: --no-check")
    assert set(later.document) == {"format", "modelathe", "model", "number", "state", "digest", "url", "untried"}


def test_one_program_holds_two_servers(
    place: Path, tmp_path: Path, publish_tiny: Callable[..., staging.Version], server_prefix: Path
) -> None:
    other = tmp_path / "other"
    publish_tiny(other)
    with serve.up(place, probe=False) as one, serve.up(other, probe=False) as two:
        assert one.grpc != two.grpc
        found = {running.repository for running in state.everything()}
        assert {place.resolve(), other.resolve()} <= found


def test_wrong_keywords_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no option 'ports'"), serve.up(place, ports=1):  # type: ignore[call-arg]
        pass
    with pytest.raises(UsageError, match="belong together"), serve.up(place, tls_cert="a.pem"):
        pass
    with pytest.raises(UsageError, match="there is no option 'cheque'"):
        serve.add(tmp_path / "a.onnx", place, cheque=False)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="--device"):
        serve.add(save_tiny(tmp_path / "b.onnx"), place, name="b", device="abacus")  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), 9)"])
def test_nothing_is_left_of_a_program_that_ends_in_the_block(place: Path, server_prefix: Path, end: str) -> None:
    code = (
        "import os, sys, contextlib, serve\n"
        "stack = contextlib.ExitStack()\n"
        f"server = stack.enter_context(serve.up({str(place)!r}))\n"
        "print(server.pid, server.log, flush=True)\n"
        f"{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=os.environ)
    pid, log = done.stdout.split()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert not [running for running in state.everything() if running.repository == place.resolve()]
    if end == "sys.exit()":
        assert done.returncode == 0, done.stderr
        assert not Path(log).exists()
