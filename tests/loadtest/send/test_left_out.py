"""Data with nothing in it: tensors of size 0, and inputs that a request may leave out, in each kind of file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from loadtest.cli import main
from loadtest.plan.data import read
from loadtest.plan.data.request import Signature
from modelathe.client import connect
from modelathe.errors import BadInput
from modelathe.tensors import BATCH, UNBOUNDED, Dim, TensorSpec
from serve.cli import main as serve
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

FLOATS = {"datatype": "FP32"}
ROWS = {"a": np.array([[1, 2]], np.float32), "b": np.zeros((0, 2), np.float32), "y": np.array([[1, 2]], np.float32)}
X, SCALE = np.array([1, 2, 3, 4], np.float32), np.array([2], np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    here = tmp_path_factory.mktemp("left_out")
    path, place = here / "model.onnx", here / "repository"
    save(
        *(path, [("Concat", ["a", "b"], ["ab"], {"axis": 0}), ("ReduceSum", ["ab", "first"], ["y"])]),
        *([("a", T.FLOAT, ["P", 2]), ("b", T.FLOAT, ["Q", 2])], [("y", T.FLOAT, [1, 2])]),
        [("first", np.array([0], np.int64))],
    )
    sizes = ["--dim", "P=1,2,4", "--dim", "Q=1,2,4"]
    done = CliRunner().invoke(serve, ["add", str(path), "--name", "edges", "--repository", str(place), *sizes])
    assert done.exit_code == 0, done.output
    (place / "scaled" / "1").mkdir(parents=True)
    save(
        *(place / "scaled" / "1" / "model.onnx", [("Mul", ["x", "scale"], ["y"])]),
        *([("x", T.FLOAT, [4]), ("scale", T.FLOAT, [1])], [("y", T.FLOAT, [4])]),
        [("scale", np.ones(1, np.float32))],
    )
    tensor = '{ name: "%s" data_type: TYPE_FP32 dims: [%d] %s }'
    inputs = f"input [{tensor % ('x', 4, '')}, {tensor % ('scale', 1, 'optional: true')}]"
    text = f'backend: "onnxruntime" {inputs} output [{tensor % ("y", 4, "")}]'
    (place / "scaled" / "config.pbtxt").write_text(text)
    with running(place, grace=0) as endpoint:
        yield endpoint


def load(served: Endpoint, scheme: str, model: str, data: Path) -> None:
    """Send the data and compare every answer with what stands in it."""
    command = ["run", model, "--url", getattr(served, scheme), "--data", str(data), "--requests", "8", "--json"]
    more = ["--warmup", "0s", "--allow-invalid", "--tolerance", "1e-6", "--output", str(data.with_suffix(".result"))]
    done = CliRunner().invoke(main, [*command, *more])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["checked"] == 8


def tensor(name: str, array: np.ndarray) -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "data": array.ravel().tolist(), **FLOATS}


def content(array: np.ndarray) -> dict[str, Any]:
    return {"content": array.ravel().tolist(), "shape": list(array.shape)}


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "npz"])
def test_sizes_of_0(served: Endpoint, scheme: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "npz":
        np.savez(path, **{name: np.stack([array, array]) for name, array in ROWS.items()})
    elif kind == "json":
        rows = {name: content(ROWS[name]) for name in ROWS}
        right = {"y": rows.pop("y")}
        path.write_text(json.dumps({"data": [rows], "validation_data": [right]}))
    else:
        inputs, outputs = [tensor(name, ROWS[name]) for name in "ab"], [tensor("y", ROWS["y"])]
        path.write_text(json.dumps({"at": 0, "model": "edges", "inputs": inputs, "outputs": outputs}) + "\n")
    load(served, scheme, "edges", path)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_a_size_of_0_that_is_said(served: Endpoint, scheme: str, tmp_path: Path) -> None:
    sizes = ["--shape", "a:1,2", "--shape", "b:0,2", "--requests", "8", "--tolerance", "0"]
    more = ["--warmup", "0s", "--allow-invalid", "--json", "--output", str(tmp_path / "r.jsonl")]
    done = CliRunner().invoke(main, ["run", "edges", "--url", getattr(served, scheme), *sizes, *more])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["checked"] == 8


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "npz"])
def test_inputs_that_are_left_out(served: Endpoint, scheme: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{kind}"
    samples: list[dict[str, np.ndarray]] = [{"x": X}, {"x": X, "scale": SCALE}]
    right = [{"y": X}, {"y": 2 * X}]
    if kind == "npz":
        np.savez(path, x=np.stack([X, X]), y=np.stack([X, X]))
    elif kind == "json":
        listed = [[{name: array.tolist() for name, array in row.items()} for row in rows] for rows in (samples, right)]
        path.write_text(json.dumps({"data": listed[0], "validation_data": listed[1]}))
    else:
        with path.open("w") as file:
            for row, answer in zip(samples, right, strict=True):
                inputs, outputs = ([tensor(*pair) for pair in rows.items()] for rows in (row, answer))
                line = {"at": 0, "model": "scaled", "inputs": inputs, "outputs": outputs}
                file.write(json.dumps(line) + "\n")
    load(served, scheme, "scaled", path)


def test_the_server_says_which_inputs_are_optional(served: Endpoint) -> None:
    for url in (served.http, served.grpc):
        with connect(url) as client:
            assert client.optional("scaled") == {"scale"}
            assert client.optional("edges") == frozenset()


def test_what_may_not_be_left_out(tmp_path: Path) -> None:
    x, scale = TensorSpec("x", "float32", (BATCH, 4)), TensorSpec("scale", "float32", (BATCH, 1))
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"data": [{"x": X.tolist()}, {"x": X.tolist(), "scale": [2]}]}))
    with pytest.raises(BadInput, match="the model's inputs are x, scale"):
        read.read(path, Signature([x, scale]))
    signature = Signature([x, scale], optional=frozenset({"scale"}))
    assert [set(payload) for payload in read.read(path, signature).payloads] == [{"x"}, {"x", "scale"}]
    with pytest.raises(BadInput, match="leave out different inputs") as caught:
        read.read(path, signature, batch=2)
    assert "--batch 1" in caught.value.fix


@pytest.mark.parametrize(("largest", "fits"), [(UNBOUNDED, True), (8, False)])
def test_a_size_that_somebody_bounded_is_not_0(largest: int, fits: bool) -> None:
    assert TensorSpec("x", "float32", (Dim("n", 1, 1, largest), 2)).takes((0, 2)) is fits
