"""Numbers without dims, of models without a batch axis: served with one dim of size 1, as Triton's own backend does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from modelathe.client import connect
from serve.cli import main
from serve.repository import lint
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

X = np.array([1, 2, 3, 6], np.float32)
GRAPHS: dict[str, tuple[list[Any], list[Any], list[Any], dict[str, Any], dict[str, Any]]] = {
    "mean": (
        [("ReduceMean", ["x"], ["loss"], {"keepdims": 0})],
        [("x", T.FLOAT, [4])],
        [("loss", T.FLOAT, [])],
        *({"x": X}, {"loss": np.array([3], np.float32)}),
    ),
    "scaled": (
        [("Mul", ["x", "t"], ["y"])],
        [("x", T.FLOAT, [4]), ("t", T.FLOAT, [])],
        [("y", T.FLOAT, [4])],
        *({"x": X, "t": np.array([2], np.float32)}, {"y": 2 * X}),
    ),
    "both": (
        [("Not", ["a"], ["b"]), ("Add", ["i", "i"], ["j"]), ("Identity", ["s"], ["r"])],
        [("a", T.BOOL, []), ("i", T.INT64, []), ("s", T.STRING, [])],
        [("b", T.BOOL, []), ("j", T.INT64, []), ("r", T.STRING, [])],
        {"a": np.array([True]), "i": np.array([4]), "s": np.array([b"t"], object)},
        {"b": np.array([False]), "j": np.array([8]), "r": np.array([b"t"], object)},
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Path:
    """Each model as `serve add` publishes it, and with nothing but its file."""
    here = tmp_path_factory.mktemp("scalars")
    for model, graph in GRAPHS.items():
        onnx = save(here / "model.onnx", *graph[:3])
        command = ["add", str(onnx), "--name", model, "--repository", str(here / "repository")]
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        bare = here / "repository" / f"bare_{model}" / "1"
        bare.mkdir(parents=True)
        onnx.rename(bare / "model.onnx")
    return here / "repository"


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Endpoint]:
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("model", [*GRAPHS, *(f"bare_{model}" for model in GRAPHS)])
def test_a_number_without_dims(served: Endpoint, model: str, scheme: str) -> None:
    *_, sent, right = GRAPHS[model.removeprefix("bare_")]
    with connect(getattr(served, scheme)) as client:
        answer = client.infer(model, sent)
    for name, array in right.items():
        assert answer[name].shape == array.shape
        np.testing.assert_array_equal(answer[name], array)


def test_check_agrees(place: Path) -> None:
    assert [finding for finding in lint.check(place) if finding.level == "error"] == []
