"""quantize.smooth: outliers leave activations, and the scale goes where it costs nothing."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.graph import graph
from optimize.methods.quantize import fold
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.smooth import Smooth
from optimize.methods.quantize.static import Static
from optimize.model.errors import NoEffect
from optimize.predict.onnxruntime import OnnxPredictor
from tests.optimize.methods.quantize.test_quantize import ROW, Quantize, distance, kernels, quantize, workload

__all__ = ["quantize"]


class Outliers(nn.Module):
    """A dense layer whose input has one channel a hundred times the others, as transformers have.

    Args:
        weight: how much smaller than the others the weights are that this channel meets.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.one.weight[7] *= 100
            self.two.weight[:, 7] /= weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(input))


@pytest.mark.parametrize("rank", [2, 3], ids=["Gemm", "MatMul"])
# With weights of 7 bits, whose sums no CPU cuts off.
@pytest.mark.parametrize("after", [Dynamic(reduce_range=True), Static(reduce_range=True)], ids=["dynamic", "static"])
def test_smoothing_takes_outliers_out_of_activations(
    rank: int, after: object, quantize: Quantize, tmp_path: Path
) -> None:
    spec = ROW if rank == 2 else TensorSpec("input", "float32", (BATCH, 3, 64))
    made = workload(Outliers(4).eval(), spec)
    source = tmp_path / "model.onnx"
    plain = distance(quantize(after, source, made), made)
    for outliers in (0, 4):
        smoothed = shutil.copy(quantize(Smooth(outliers=outliers), source, made), tmp_path / "smooth.onnx")
        result = quantize(after, Path(smoothed), made)
        assert distance(result, made) < plain / 2
        found = kernels(result, tmp_path)
        assert found.count("MatMul") + found.count("Gemm") == (1 if outliers else 0), "the float product stays float"


def test_smoothing_alone_changes_nothing_but_rounding(quantize: Quantize, tmp_path: Path) -> None:
    for weight, split in ((100, False), (4, True)):
        made = workload(Outliers(weight).eval(), ROW)
        source = tmp_path / f"{weight}.onnx"
        path = quantize(Smooth(), source, made)
        assert distance(path, made) < 1e-5
        assert [file.name for file in path.parent.iterdir()] == [source.name]
        added = {node.name for node in graph.load(path).graph} - {node.name for node in graph.load(source).graph}
        split_off = {f"two/Gemm_{name}/float" for name in ("smoothing", "pick", "outliers", "total")}
        assert added == (split_off if split else set()), "weights that are small enough take the outlier over"


def test_smoothing_keeps_excluded_layers_as_they_are(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Outliers(4).eval(), ROW)
    with pytest.raises(NoEffect, match="no activation before a dense layer has outliers"):
        quantize(Smooth(exclude=("two/*",)), tmp_path / "model.onnx", made)


def test_smoothing_where_nothing_stands_out_is_loud(quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(NoEffect, match="no activation before a dense layer has outliers"):
        quantize(Smooth(), tmp_path / "model.onnx", workload(nn.Linear(64, 64), replace(ROW, values=(-1, 1))))


class Normalized(nn.Module):
    """Two dense layers behind one normalization whose channel 7 is large, and perhaps somebody else behind it.

    Args:
        norm: the normalization.
        residual: whether the normalization's result is added to the layers' as well.
    """

    def __init__(self, norm: nn.Module, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.residual = norm, residual
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 1.5)
            self.norm.weight[7] = 30
            if getattr(norm, "bias", None) is not None:
                self.norm.bias.normal_()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.norm(input)
        y = self.one(x) + self.two(x)
        return x + y if self.residual else y


@pytest.mark.parametrize(
    ("norm", "residual", "folded"),
    [
        (nn.LayerNorm(64), False, True),
        (nn.LayerNorm(64, bias=False), False, True),
        (nn.RMSNorm(64), False, True),
        (nn.LayerNorm(64), True, False),
    ],
    ids=["layer norm", "without bias", "RMS norm", "read by a residual too"],
)
@pytest.mark.parametrize("rank", [2, 3])
def test_the_scale_goes_into_the_normalization_where_only_the_layers_read_it(
    norm: nn.Module, residual: bool, folded: bool, rank: int, quantize: Quantize, tmp_path: Path
) -> None:
    spec = ROW if rank == 2 else TensorSpec("input", "float32", (BATCH, 3, 64))
    made = workload(Normalized(norm, residual).eval(), spec)
    source = tmp_path / "model.onnx"
    path = quantize(Smooth(outliers=0), source, made)
    assert distance(path, made) < 1e-5
    before, after = ([node.op_type for node in graph.load(each).graph] for each in (source, path))
    assert sorted(after) == sorted(before if folded else [*before, "Mul"])
    assert any("_folded_" in str(name) for name in graph.load(path).graph.initializers) == folded


def test_an_excluded_layer_before_keeps_its_weights(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Outliers(100).eval(), ROW)
    path = quantize(Smooth(exclude=("one/*",)), tmp_path / "model.onnx", made)
    assert "two/Gemm_smoothing/float" in {node.name for node in graph.load(path).graph}
    assert distance(path, made) < 1e-5


def chain(nodes: list[onnx.NodeProto], weights: dict[str, Any]) -> onnx.ModelProto:
    """Return a graph from x, float32 [2, 3, 4], to y."""
    made = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


RNG = np.random.default_rng(0)
CHANNELS, MATRIX = RNG.normal(size=4), RNG.normal(size=(4, 4))
NORM = helper.make_node("LayerNormalization", ["x", "g", "b"], ["h"], name="norm")
LAST = helper.make_node("Identity", ["h"], ["y"])
MS = {"domain": "com.microsoft"}
CHAINS = {
    "layer norm": ([NORM, LAST], {"g": CHANNELS, "b": CHANNELS}, True),
    "skip layer norm": (
        [helper.make_node("SkipLayerNormalization", ["x", "x", "g", "b"], ["h"], name="norm", **MS), LAST],
        {"g": CHANNELS, "b": CHANNELS},
        True,
    ),
    "gain of a norm that was taken apart": (
        [helper.make_node("Mul", ["x", "g"], ["h"], name="gain"), LAST],
        {"g": CHANNELS},
        True,
    ),
    "dense layer": (
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
            helper.make_node("Add", ["b", "p"], ["q"], name="bias"),
            helper.make_node("Relu", ["q"], ["h"], name="relu"),
            LAST,
        ],
        {"w": MATRIX, "b": CHANNELS},
        True,
    ),
    "a sum of two activations": ([helper.make_node("Add", ["x", "x"], ["h"], name="sum"), LAST], {}, False),
    "a product that another node reads": (
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
            helper.make_node("Add", ["p", "b"], ["h"], name="bias"),
            helper.make_node("Add", ["h", "p"], ["y"]),
        ],
        {"w": MATRIX, "b": CHANNELS},
        False,
    ),
    "a function that is not linear": ([helper.make_node("Tanh", ["x"], ["h"], name="tanh"), LAST], {}, False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_factor_is_folded_exactly_or_not_at_all(name: str, tmp_path: Path) -> None:
    nodes, weights, folded = CHAINS[name]
    path = tmp_path / "model.onnx"
    onnx.save(chain(nodes, weights), path)
    model = graph.load(path)
    value = next(value for node in model.graph for value in node.outputs if value.name == "h")
    factor = np.array([0.5, 2, 0.1, 1], np.float32)
    assert fold.into_producer(model, value, factor, []) == folded
    onnx_ir.save(model, tmp_path / "folded.onnx")
    x = {"x": RNG.normal(size=(2, 3, 4)).astype(np.float32)}
    with OnnxPredictor(path) as before, OnnxPredictor(tmp_path / "folded.onnx") as after:
        wanted, got = before.predict(x)["y"], after.predict(x)["y"]
    assert np.allclose(got, wanted * factor if folded else wanted, rtol=1e-5, atol=1e-6)
