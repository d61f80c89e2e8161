"""Quantization-aware training: what is exported, what stays dynamic, what is refused."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.judge.evaluate import evaluate
from optimize.methods import apply as step
from optimize.methods.prune.channels import Channels
from optimize.methods.quantize import captured, qat
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.qat import Qat
from optimize.model.errors import BadGraph, BadModel, BadRecipe, BadWorkload, NoEffect
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs.recipe import ordered
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

TOKENS = TensorSpec("tokens", "float32", (BATCH, Dim("steps", 1, 6, 20), 12))
MASK = TensorSpec("mask", "float32", (BATCH, Dim("steps", 1, 6, 20)))


class Pooled(nn.Module):
    """Two inputs with a second dynamic axis, a dropout, and a mapping as the result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.drop, self.out = nn.Linear(12, 64), nn.Dropout(0.1), nn.Linear(64, 8)

    def forward(self, mask: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.drop(self.hidden(tokens).relu()) * mask[..., None]
        return {"y": self.out(states.sum(1) / (mask.sum(1, keepdim=True) + 1))}


class Branching(Pooled):
    def forward(self, mask: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(mask, tokens if tokens.sum() > 0 else -tokens)


def pooled(module: nn.Module) -> Workload:
    def batches(seed: int = 0) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        for steps in (6, 6):
            tokens = rng.normal(size=(32, steps, 12)).astype(np.float32)
            yield Batch({"mask": np.ones((32, steps), np.float32), "tokens": tokens}, np.zeros(32))

    return Workload(
        *("pooled", module, (MASK, TOKENS), ("y",), lambda: batches(1)),
        lambda outputs, targets, reference: {"near": -((outputs["y"] - reference["y"]) ** 2).mean(1)},
        training=batches,
        higher_is_better={"near": True},
    )


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """Run the step and return the file, and what it said."""

    def run(config: Qat, made: Workload) -> tuple[Path, list[str]]:
        said: list[str] = []
        context = Context(made, made.build(), Target(cores=1), 0, tmp_path, lambda text, _: said.append(text))
        return step.apply(config, made.build(), context), said

    return run


Train = Callable[..., tuple[Path, list[str]]]


@pytest.mark.slow
def test_the_small_net_learns_in_int8_and_runtime_and_module_agree(train: Train, small: Workload) -> None:
    path, said = train(Qat(epochs=2), small)
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    weights = [array for array in stored if array.ndim > 1]
    assert len(weights) == 4
    assert {array.dtype for array in weights} == {np.dtype("int8")}
    names = [node.name for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm", "BatchNormalization")]
    assert names == ["conv/Conv", "hidden/Gemm", "wide/Gemm", "out/Gemm"]
    assert path.stat().st_size < sum(array.size for array in weights) + 16_000
    with OnnxPredictor(path) as predictor:
        trained = evaluate(predictor, small).scores[0].value
    assert trained > 0.88, "no worse than the float model that it started from"
    losses = re.search(
        r"accuracy (\S+), loss (\S+) with rounding; accuracy (\S+), loss (\S+) converted", "\n".join(said)
    )
    assert losses
    fake, converted = [(float(losses[n]), float(losses[n + 1])) for n in (1, 3)]
    assert np.allclose(fake, converted, atol=0.02)
    assert converted[0] == pytest.approx(trained, abs=0.003)
    assert any("the same largest value in 39" in line for line in said)


@pytest.mark.slow
def test_other_dims_stay_dynamic_and_no_loss_is_needed(train: Train) -> None:
    made = pooled(Pooled())
    path, said = train(Qat(epochs=1, activations="int8"), made)
    with OnnxPredictor(path) as predictor:
        for size, steps in ((1, 1), (3, 20), (9, 5)):
            inputs = {"mask": np.ones((size, steps), np.float32), "tokens": np.ones((size, steps, 12), np.float32)}
            assert predictor.predict(inputs)["y"].shape == (size, 8)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*onnx.load(path).graph.input, *onnx.load(path).graph.output)
    }
    assert shapes == {"mask": ["batch", "steps"], "tokens": ["batch", "steps", 12], "y": ["batch", 8]}
    zero_points = {
        onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    }
    assert zero_points == {"int8"}, "with int8 activations nothing is uint8"
    assert any("values that differ by" in line for line in said)


def test_a_module_that_cannot_be_followed_is_refused_by_name() -> None:
    with pytest.raises(BadModel, match=r"Branching: quantize\.qat cannot follow it: GuardOnDataDependent") as raised:
        captured.prepared(Branching(), pooled(Branching()), "quantize.qat", symmetric=False)
    assert "quantize.static" in raised.value.fix


def test_nothing_to_quantize_is_loud(train: Train) -> None:
    class Sum(nn.Module):
        def forward(self, mask: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": tokens.sum(1)[:, :8]}

    with pytest.raises(NoEffect, match="nothing in it can be quantized"):
        train(Qat(), pooled(Sum()))


def test_it_needs_training_data_before_anything_starts(train: Train) -> None:
    with pytest.raises(BadWorkload, match="training"):
        train(Qat(), replace(pooled(Pooled()), training=None))


def test_it_is_the_one_export_of_a_recipe() -> None:
    assert ordered((Channels(), Qat())) == (Channels(), Qat())
    for steps in ((Qat(), Channels()), (Qat(), Qat()), (Dynamic(), Qat())):
        with pytest.raises(BadRecipe, match="out of order"):
            ordered(steps)


def test_agreement_is_on_classes_or_else_on_values() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(1000, 10)).astype(np.float32)
    got = wanted.copy()
    got[:2] = -wanted[:2]
    assert "998 of 1000" in qat._agreement(got, wanted)
    got[2] = -wanted[2]
    with pytest.raises(BadGraph, match="997 of 1000 rows"):
        qat._agreement(got, wanted)
    flipped = wanted[:10].copy()
    flipped[0] = -wanted[0]
    assert "9 of 10" in qat._agreement(flipped, wanted[:10]), "one row may always differ"
    assert "differ by 1.00%" in qat._agreement(wanted[:, :1] * 1.01, wanted[:, :1])
    with pytest.raises(BadGraph, match=r"differ by 5.00%"):
        qat._agreement(wanted[:, :1] * 1.05, wanted[:, :1])
    with pytest.raises(BadGraph):
        qat._agreement(np.full((20, 4), np.nan), np.eye(1, 4).repeat(20, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_a_torch_step_after_it_is_refused(optimize: Any, user_file: Callable[..., str], tmp_path: Path) -> None:
    bundle = tmp_path / "qat"
    assert optimize("quantize", user_file(), "--method", "qat", "--epochs", 1, "--output", bundle).code == 0
    after = optimize("prune", bundle, "--output", tmp_path / "pruned")
    assert after.code == 2
    assert "out of order" in after.err
    again = optimize("quantize", bundle, "--method", "dynamic", "--output", tmp_path / "again")
    assert again.code == 4
    assert "quantized already" in again.err
