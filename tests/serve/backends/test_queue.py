"""What the settings of the queue do to requests that wait, on a real server whose model takes its time."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelathe.tensors import BATCH, TensorSpec
from serve.config import settings
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

X, Y = TensorSpec("x", "float32", (BATCH, 1)), TensorSpec("y", "float32", (BATCH, 1))
SIZE = 1200
"""Of two square matrices, whose product takes long beside a request's way."""


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("slow")
    place, onnx = here / "repository", here / "model.onnx"
    save(
        onnx,
        [
            ("ReduceSum", ["x"], ["sum"]),
            ("Mul", ["sum", "matrix"], ["scaled"]),
            *(("MatMul", [f"{'scaled' if n == 0 else n}", "matrix"], [str(n + 1)]) for n in range(3)),
            ("ReduceMean", ["3"], ["mean"]),
            ("Mul", ["mean", "zero"], ["nothing"]),
            ("Add", ["x", "nothing"], ["y"]),
        ],
        [("x", T.FLOAT, ["batch", 1])],
        [("y", T.FLOAT, ["batch", 1])],
        [("matrix", np.full((SIZE, SIZE), 1e-6, np.float32)), ("zero", np.zeros((1, 1), np.float32))],
    )
    asked = {
        "levels": {"max_batch": 1, "priorities": 2},
        "refused": {"max_batch": 1, "timeout_ms": 1},
        "delayed": {"max_batch": 1, "timeout_ms": 1, "on_timeout": "delay"},
    }
    for model, one in asked.items():
        made = settings.read(one, model)
        with staging.stage(place, model, Source(onnx, [X], [Y]), Target(cores=1), made) as staged:
            staging.publish(staged, {})
    with running(place, grace=0) as endpoint:
        yield endpoint


def sent(endpoint: Endpoint, model: str, *priorities: int) -> list[tuple[int, bool]]:
    """Send a request for each priority, all at once, and return (which, answered) in the order of their answers."""
    import tritonclient.grpc as library

    done: queue.Queue[tuple[int, bool]] = queue.Queue()
    with library.InferenceServerClient(endpoint.grpc.removeprefix("grpc://")) as client:
        for number, priority in enumerate(priorities):
            tensor = library.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.full((1, 1), number, np.float32))
            client.async_infer(
                model,
                [tensor],
                lambda result, error, number=number: done.put((number, error is None)),
                priority=priority,
            )
            time.sleep(0.005)  # they arrive in this order
        return [done.get(timeout=60) for _ in priorities]


@pytest.mark.timed
def test_the_first_level_goes_before_the_others(slow: Endpoint) -> None:
    order = sent(slow, "levels", *8 * [2], 1)
    assert all(answered for _, answered in order)
    # What runs already, and what the instance holds ready, is not taken back.
    assert [number for number, _ in order].index(8) <= 4
    assert [number for number, _ in sent(slow, "levels", *8 * [2], 2)].index(8) == 8


@pytest.mark.timed
def test_who_waited_too_long_is_refused_or_answered_later(slow: Endpoint) -> None:
    answered = [answered for _, answered in sent(slow, "refused", *8 * [0])]
    assert {True, False} == set(answered)
    assert all(answered for _, answered in sent(slow, "delayed", *8 * [0]))
