"""The batch axis: a first dim that is none is found out before anything is published, and the way out is followed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from modelathe.client import connect
from modelathe.errors import UsageError
from modelathe.tensors import BATCH, UNBATCHED, Dim, TensorSpec
from serve.cli import main
from serve.repository import batching, onnx_file, source
from serve.repository import tree as repository
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

X = TensorSpec("x", "float32", (BATCH, 3), values=(-1, 1))
AXIS, ORDER = np.int64(0), np.array([0], np.int64)
WEIGHT = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
FLOAT = ("y", T.FLOAT, ["N", 3])
GRAPHS: dict[str, tuple[list[Any], Any, list[Any], bool]] = {
    "a running sum": ([("CumSum", ["x", "axis"], ["y"])], FLOAT, [("axis", AXIS)], True),
    "a softmax over the first dim": ([("Softmax", ["x"], ["y"], {"axis": 0})], FLOAT, [], True),
    "the mean of the batch is taken away": (
        [("ReduceMean", ["x", "axes"], ["m"]), ("Sub", ["x", "m"], ["y"])],
        *(FLOAT, [("axes", ORDER)], True),
    ),
    "the greatest of the batch": ([("ReduceMax", ["x"], ["m"]), ("Mul", ["x", "m"], ["y"])], FLOAT, [], True),
    "back to front": (
        [("Slice", ["x", "from", "to", "axes", "steps"], ["y"])],
        FLOAT,
        [("from", ORDER - 1), ("to", ORDER - 10**9), ("axes", ORDER), ("steps", ORDER - 1)],
        True,
    ),
    "a running sum of integers": (
        [
            ("Mul", ["x", "ten"], ["tens"]),
            ("Cast", ["tens"], ["i"], {"to": T.INT64}),
            ("CumSum", ["i", "axis"], ["y"]),
        ],
        *(("y", T.INT64, ["N", 3]), [("ten", np.float32(10)), ("axis", AXIS)], True),
    ),
    "a sequence that is remembered from row to row": (
        [
            ("Unsqueeze", ["x", "one"], ["t"]),
            ("RNN", ["t", "w", "r"], ["h"], {"hidden_size": 3}),
            ("Reshape", ["h", "rows"], ["y"]),
        ],
        FLOAT,
        [("one", ORDER + 1), ("w", WEIGHT[None, :, :3]), ("r", WEIGHT[None, :, 3:6]), ("rows", np.array([-1, 3]))],
        True,
    ),
    "each row by itself": ([("Softmax", ["x"], ["y"], {"axis": 1})], FLOAT, [], False),
    "minus infinity where masked": (
        [("Less", ["x", "zero"], ["c"]), ("Where", ["c", "x", "least"], ["y"])],
        *(FLOAT, [("zero", np.float32(0)), ("least", np.float32(-np.inf))], False),
    ),
    "integers of a range that is the batch's": (
        [
            ("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            ("MatMulInteger", ["q", "w", "z"], ["i"]),
            ("Cast", ["i"], ["f"], {"to": T.FLOAT}),
            ("Mul", ["f", "s"], ["y"]),
        ],
        ("y", T.FLOAT, ["N", 8]),
        [("w", (WEIGHT * 20).astype(np.int8))],
        False,
    ),
    "another answer each time": (
        [("RandomNormalLike", ["x"], ["r"]), ("Add", ["x", "r"], ["y"])],
        *(FLOAT, [], False),
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_that_depend_on_each_other(graph: str, tmp_path: Path) -> None:
    nodes, output, weights, expected = GRAPHS[graph]
    path = save(tmp_path / "model.onnx", nodes, [("x", T.FLOAT, ["N", 3])], [output], weights)
    session = onnxruntime.InferenceSession(path)

    def ask(inputs: Any) -> dict[str, Any]:
        return {"y": session.run(["y"], inputs)[0]}

    assert batching.mixed(ask, [X], 32, onnx_file.in_integers(path)) == ("y" if expected else "")
    assert batching.mixed(ask, [X], 1, onnx_file.in_integers(path)) == ""


def add(*options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["add", *options])
    return done.exit_code, done.output + done.stderr


@pytest.fixture
def time_first(tmp_path: Path) -> Path:
    nodes = [("CumSum", ["x", "axis"], ["y"])]
    return save(
        tmp_path / "model.onnx", nodes, [("x", T.FLOAT, ["T", 3])], [("y", T.FLOAT, ["T", 3])], [("axis", AXIS)]
    )


def test_time_in_the_first_dim_is_refused_and_the_way_out_works(
    time_first: Path, tmp_path: Path, server_prefix: Path
) -> None:
    place = tmp_path / "repository"
    options = [str(time_first), "--name", "sums", "--repository", str(place)]
    code, said = add(*options)
    assert (code, "depends on the batch" in said, "--batch-axis none" in said) == (4, True, True), said
    assert not place.exists()
    code, said = add(*options, "--batch-axis", "none")
    assert (code, "say --dim T=SMALLEST,TYPICAL,LARGEST" in said) == (2, True), said
    code, said = add(*options, "--batch-axis", "none", "--dim", "T=1,4,64")
    assert code == 0, said
    code, said = add(str(time_first), "--name", "whole", "--repository", str(place), "--set", "max_batch=0")
    assert code == 0, said
    x = np.arange(15, dtype=np.float32).reshape(5, 3)
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        for model in ("sums", "whole"):
            np.testing.assert_array_equal(client.infer(model, {"x": x})["y"], x.cumsum(0))


def test_more_rows_out_than_in(tmp_path: Path, server_prefix: Path) -> None:
    path = save(
        *(tmp_path / "model.onnx", [("Concat", ["x", "x"], ["y"], {"axis": 0})]),
        *([("x", T.FLOAT, ["T", 3])], [("y", T.FLOAT, ["U", 3])]),
    )
    options = [str(path), "--name", "twice", "--repository", str(tmp_path / "repository")]
    code, said = add(*options)
    assert (code, "the served shape is" in said, "--batch-axis none" in said) == (4, True, True), said
    assert add(*options, "--batch-axis", "none", "--dim", "T=1,4,8")[0] == 0


def test_a_configuration_that_batches_time(time_first: Path, tmp_path: Path, server_prefix: Path) -> None:
    home = tmp_path / "repository" / "sums"
    (home / "1").mkdir(parents=True)
    time_first.rename(home / "1" / "model.onnx")
    tensor = '{ name: "%s" data_type: TYPE_FP32 dims: [%s 3] }'

    def written(batch: int, first: str) -> str:
        tensors = f"input [{tensor % ('x', first)}] output [{tensor % ('y', first)}]"
        return f'backend: "onnxruntime" max_batch_size: {batch} {tensors}'

    (home / "config.pbtxt").write_text(written(8, ""))
    command = ["check", "--repository", str(home.parent), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 4
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["level"], "depends on the batch" in finding["what"]) == ("error", True)
    assert finding["fix"].startswith("set max_batch_size to 0, and state the first dim of each tensor, -1")
    (home / "config.pbtxt").write_text(written(0, "-1,"))
    assert CliRunner().invoke(main, command).exit_code == 0


def test_the_axis_that_is_named(time_first: Path, tmp_path: Path) -> None:
    found = source.load(time_first, {}, "T")
    assert [spec.dims for spec in (*found.inputs, *found.outputs)] == [(BATCH, 3)] * 2
    steps = Dim("T", 1, 4, 64)
    found = source.load(time_first, {"T": steps}, "none")
    assert [spec.dims for spec in (*found.inputs, *found.outputs)] == [(steps, 3)] * 2
    second = save(
        *(tmp_path / "second.onnx", [("Neg", ["x"], ["y"])]),
        *([("x", T.FLOAT, ["T", "N", 3])], [("y", T.FLOAT, ["T", "N", 3])]),
    )
    with pytest.raises(UsageError, match="--batch-axis N: it is not the first dim") as caught:
        source.load(second, {"T": steps}, "N")
    assert "say --batch-axis none" in caught.value.fix
    found = source.load(second, {"T": steps, "N": Dim("N", 1, 2, 4)}, "none")
    assert not any(spec.batched for spec in found.inputs)


def test_a_dim_that_is_called_batch_and_is_none(tmp_path: Path) -> None:
    path = save(
        *(tmp_path / "model.onnx", [("Neg", ["x"], ["y"])]),
        *([("x", T.FLOAT, ["batch", 3])], [("y", T.FLOAT, ["batch", 3])]),
    )
    found = source.load(path, {"batch": Dim("batch", 1, 2, 4)}, "none")
    assert [spec.dims[0] for spec in found.inputs] == [Dim(UNBATCHED, 1, 2, 4)]


def test_without_batches_of_the_server_a_version_says_so(time_first: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    options = ["--repository", str(place), "--name", "sums", "--no-check"]
    assert add(str(time_first), *options, "--set", "max_batch=0")[0] == 0
    config = repository.config(place, "sums")
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [-1, 3])
    assert repository.read_lineage(place, "sums")["inputs"][0]["dims"][0]["name"] == UNBATCHED
    code, said = add(str(place / "sums" / "1"), *options, "--set", "max_batch=4")
    assert (code, "max_batch = 4: the model has no batch axis" in said) == (4, True), said
    code, said = add(str(place / "sums" / "1"), *options, "--batch-axis", "T")
    assert (code, "the batch axis of a version stays" in said) == (2, True), said
