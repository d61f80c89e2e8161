import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loadtest.record.counts import counted
from modelathe.client import connect
from modelathe.errors import ModelatheError
from modelathe.tensors import BATCH, TensorSpec
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import interface, staging
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server import control, dryload
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.watch import probe
from serve.watch.healing import watching
from tests.conftest import TINY, TINY_OUTPUTS, save_tiny
from tests.serve.server.test_server import eventually

ONE = {"x": np.ones((1, 4), np.float32)}


def backend_processes(pid: int) -> list[int]:
    command = ["pgrep", "-P", str(pid), "-f", "triton_python_backend_stub"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def answers(url: str) -> bool:
    try:
        with connect(url) as client:
            return client.infer(TINY, ONE)["y"].shape == (1, 3)
    except ModelatheError:
        return False


@pytest.mark.timed
def test_probe_replaces_a_killed_backend_process(
    model_repository: Path, server_prefix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        running(model_repository, grace=0) as endpoint,
        watching(endpoint, model_repository),
    ):
        dead = backend_processes(endpoint.pid)
        assert len(dead) == 1
        os.kill(dead[0], signal.SIGKILL)
        assert eventually(lambda: bool(caplog.messages))
        assert "was dead; the model is loaded again" in caplog.text
        assert answers(endpoint.grpc)
        assert backend_processes(endpoint.pid) != dead
        caplog.clear()
        control.unload(endpoint.http, endpoint.secret, TINY)  # a replacement that failed half-way leaves this
        assert eventually(lambda: bool(caplog.messages))
        assert answers(endpoint.grpc)


def test_a_request_is_known_without_lineage_and_without_configuration(
    endpoint: Endpoint, model_repository: Path, tmp_path: Path
) -> None:
    place = tmp_path / "model_repository"
    shutil.copytree(model_repository, place)
    with connect(endpoint.grpc) as client:
        for file in ("nothing", "1/lineage.json", "config.pbtxt"):
            (place / TINY / file).unlink(missing_ok=True)
            request = probe.question(place, TINY, client).draw(np.random.default_rng(0))
            assert {name: (array.shape, array.dtype) for name, array in request.items()} == {"x": ((1, 4), np.float32)}
            client.infer(TINY, request)
    dryload.published(place, TINY)
    with pytest.raises(BadRepository, match="lists no inputs"):
        interface.read(place, TINY)


def test_without_a_probe_it_stays_dead(model_repository: Path, server_prefix: Path) -> None:
    with running(model_repository, grace=0) as endpoint:
        assert answers(endpoint.grpc)
        os.kill(backend_processes(endpoint.pid)[0], signal.SIGKILL)
        assert eventually(lambda: not answers(endpoint.grpc))


def test_models_of_every_kind_answer_the_probe(served: Endpoint, kinds: Path) -> None:
    assert set(probe.health(served, kinds).values()) == {"answers"}


@pytest.mark.timed
def test_the_probe_follows_to_a_version_with_other_inputs(
    tmp_path: Path, server_prefix: Path, publish_tiny: Callable[..., staging.Version]
) -> None:
    place = tmp_path / "model_repository"
    publish_tiny(place)
    wide = save_tiny(tmp_path / "wide.onnx", np.ones((6, 3), np.float32))
    specs = (TensorSpec("x", "float32", (BATCH, 6)),), TINY_OUTPUTS
    with running(place, grace=0) as endpoint, watching(endpoint, place), connect(endpoint.grpc) as client:
        assert eventually(lambda: counted(client, TINY).inference_count > 33)  # the warm-up, and then the probe
        with staging.stage(place, TINY, Source(wide, *specs), Target(cores=1)) as staged:
            number = staging.publish(staged, {}).number
        rollout.promote(place, TINY, number, endpoint)
        for dead in backend_processes(endpoint.pid):
            os.kill(dead, signal.SIGKILL)
        assert eventually(lambda: probe.health(endpoint, place) == {TINY: "answers"})
