"""ONNX files as ONNX Runtime reads them: outputs that are no tensors, or of which the file does not say the rank."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from modelathe.tensors import BATCH, Dim
from serve.config.errors import BadRepository
from serve.repository import onnx_file, source
from tests.serve.backends.test_backend import save

X = ("x", T.FLOAT, ["N", 4])


def of_type(path: Path, kind: Any, name: str = "y") -> Path:
    """The file with another type of its last output."""
    model = onnx.load(path)
    model.graph.output[-1].CopyFrom(helper.make_value_info(name, kind))
    onnx.save(model, path)
    return path


def sequence(path: Path) -> Path:
    save(path, [("SplitToSequence", ["x"], ["y"])], [X], [("y", T.FLOAT, None)])
    return of_type(path, helper.make_sequence_type_proto(helper.make_tensor_type_proto(T.FLOAT, None)))


def maps(path: Path) -> Path:
    """As a classifier of scikit-learn is converted: a label, and a map from each class to its probability."""
    table = helper.make_map_type_proto(T.INT64, helper.make_tensor_type_proto(T.FLOAT, []))
    nodes = [
        helper.make_node("ArgMax", ["x"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2, 3]),
    ]
    outputs = [
        helper.make_tensor_value_info("label", T.INT64, ["N"]),
        helper.make_value_info("y", helper.make_sequence_type_proto(table)),
    ]
    graph = helper.make_graph(nodes, "graph", [helper.make_tensor_value_info(*X)], outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def perhaps(path: Path) -> Path:
    save(path, [("Optional", ["x"], ["y"])], [X], [("y", T.FLOAT, None)])
    return of_type(path, helper.make_optional_type_proto(helper.make_tensor_type_proto(T.FLOAT, ["N", 4])))


@pytest.mark.parametrize(
    ("made", "kind", "way"),
    [
        (sequence, "a sequence", "with tensors in its place"),
        (maps, "a sequence of maps", "options={'zipmap': False}"),
        (perhaps, "a optional", "with tensors in its place"),
    ],
)
def test_what_is_no_tensor_is_named(made: Any, kind: str, way: str, tmp_path: Path) -> None:
    path = made(tmp_path / "model.onnx")
    with pytest.raises(BadRepository, match=f"y is {kind}, and Triton carries tensors only") as caught:
        source.load(path, {})
    assert way in caught.value.fix
    _, outputs = onnx_file.boundary(path)
    assert outputs["y"][0] == kind
    # The way out: the same model without that output.
    model = onnx.load(path)
    kept = [output for output in model.graph.output if output.name != "y"] or [helper.make_tensor_value_info(*X)]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    assert source.load(path, {}).outputs[0].batched


BOXES, SCORES, MOST = ("boxes", T.FLOAT, [1, "A", 4]), ("scores", T.FLOAT, [1, 1, "A"]), ("most", np.array([5]))
RANKS: dict[str, tuple[list[Any], list[Any], list[Any], tuple[int | Dim, ...]]] = {
    "the picks of a detector": (
        *([("NonMaxSuppression", ["boxes", "scores", "most"], ["y"])], [BOXES, SCORES], [MOST]),
        (Dim("unk__0", 1, 1, 2**31 - 1), 3),
    ),
    "a row for each sample": (
        *([("MatMul", ["x", "w"], ["y"])], [("x", T.FLOAT, ["N", 4])], [("w", np.ones((4, 2), np.float32))]),
        (BATCH, 2),
    ),
    "a fixed shape": (
        *([("Reshape", ["x", "shape"], ["y"])], [("x", T.FLOAT, [2, 6])], [("shape", np.array([3, 4]))]),
        (3, 4),
    ),
}


def test_an_output_of_which_nothing_is_stated_is_derived(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [("Relu", ["x"], ["y"])], [X], [("y", T.FLOAT, ["N", 4])])
    model = onnx.load(path)
    model.graph.output[0].ClearField("type")
    onnx.save(model, path)
    assert source.load(path, {}).outputs[0].dims == (BATCH, 4)


@pytest.mark.parametrize("graph", RANKS)
def test_a_rank_that_the_file_does_not_state_is_derived(graph: str, tmp_path: Path) -> None:
    nodes, inputs, weights, dims = RANKS[graph]
    kind = T.INT64 if "detector" in graph else T.FLOAT
    path = save(tmp_path / "model.onnx", nodes, inputs, [("y", kind, None)], weights)
    assert source.load(path, {"A": Dim("A", 1, 8, 16)} if "detector" in graph else {}).outputs[0].dims == dims


def test_a_rank_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    nodes = [("Reshape", ["x", "shape"], ["y"])]
    inputs = [("x", T.FLOAT, [4]), ("shape", T.INT64, ["rank"])]
    path = save(tmp_path / "model.onnx", nodes, inputs, [("y", T.FLOAT, None)])
    sizes = {"rank": Dim("rank", 1, 2, 4)}
    with pytest.raises(BadRepository, match="nothing says of which type y is, or how many dims") as caught:
        source.load(path, sizes)
    assert "onnx.helper.make_tensor_value_info('y'" in caught.value.fix
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", T.FLOAT, [2, "half"]))
    onnx.save(model, path)
    assert source.load(path, sizes).outputs[0].dims[0] == 2


def test_an_input_with_a_default_is_one_that_a_request_may_give(tmp_path: Path) -> None:
    path = save(
        *(tmp_path / "model.onnx", [("Mul", ["x", "scale"], ["y"])]),
        *([("x", T.FLOAT, [4]), ("scale", T.FLOAT, [1])], [("y", T.FLOAT, [4])]),
        [("scale", np.ones(1, np.float32))],
    )
    assert set(onnx_file.boundary(path)[0]) == {"x", "scale"}
    assert [spec.name for spec in source.load(path, {}).inputs] == ["x"]
