"""export.fuse: what becomes one operator, that results stay, and what may follow."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.graph import graph
from optimize.methods import apply as step
from optimize.methods.export.fuse import Fuse
from optimize.methods.export.onnx import export
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.static import Static
from optimize.methods.table import METHODS
from optimize.model.errors import BadRecipe, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

LENGTH = Dim("length", 2, 12, 40)
ROWS = TensorSpec("x", "float32", (BATCH, LENGTH, 32))
MASK = TensorSpec("mask", "int64", (BATCH, LENGTH), values=(0, 1))


class Plain(nn.Module):
    """One pre-norm block, its projections and its attention written out, with a padding mask where one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)

        bias = None if mask is None else (1.0 - mask[:, None, None, :].float()) * -1e4
        attended = functional.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x)), bias
        )
        x = self.norm(x + self.out(attended.transpose(1, 2).reshape(x.shape)))
        return self.down(functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


class Bert(nn.Module):
    def __init__(self, attention: str) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        config._attn_implementation = attention
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state


INT8 = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul")
WORDS = TensorSpec("ids", "int64", (BATCH, LENGTH), values=(0, 49))
CASES = {
    "plain": (Plain, (ROWS,), {"MultiHeadAttention": 1, "SkipLayerNormalization": 1, "BiasGelu": 1}),
    "masked": (Plain, (ROWS, MASK), {"MultiHeadAttention": 1, "SkipLayerNormalization": 1, "BiasGelu": 1}),
    "torch": (Encoder, (ROWS,), {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}),
    "bert-eager": (
        lambda: Bert("eager"),
        (WORDS, replace(MASK, values=(1, 1))),
        {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2},
    ),
    "bert-sdpa": (
        lambda: Bert("sdpa"),
        (WORDS, replace(MASK, values=(1, 1))),
        {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2},
    ),
}


def workload(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> Workload:
    def batches(seed: int = 0) -> list[Batch]:
        rng = np.random.default_rng(seed)
        arrays = {spec.name: spec.generate(rng, 16) for spec in inputs}
        if "mask" in arrays:
            # Padding at the end, of another length in every row; at least one token is left.
            arrays["mask"] = (np.arange(12) < rng.integers(1, 13, (16, 1))).astype(np.int64)
        return [Batch(arrays)]

    return Workload("made", module, inputs, ("y",), lambda: batches(1), lambda outputs, targets, reference: {}, batches)


def apply(config: object, source: Path, made: Workload, folder: Path) -> Path:
    scratch = folder / type(config).__name__
    scratch.mkdir(parents=True)
    context = Context(made, made.build(), Target(), 0, scratch, lambda text, fraction: None)
    return Path(step.apply(config, source, context))


def kernels(path: Path, folder: Path) -> list[str]:
    """Return the operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in graph.load(folder / "optimized.onnx").graph]


def counted(path: Path) -> dict[str, int]:
    nodes = [node.op_type for node in graph.load(path).graph if node.domain == "com.microsoft"]
    return {kind: nodes.count(kind) for kind in nodes}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_attention_gelu_and_layer_norms_become_one_operator_each(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, inputs, wanted = CASES[case]
    made = workload(build().eval(), inputs)
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    fused = apply(Fuse(), source, made, tmp_path)
    assert counted(fused) == wanted
    names = [node.name or "" for node in graph.load(fused).graph]
    assert len(set(names)) == len(names)
    if case.startswith("bert"):
        assert "bert.encoder.layer.1.attention.self/MultiHeadAttention" in names
        assert "bert.encoder.layer.1.intermediate.intermediate_act_fn/BiasGelu" in names
    batch = next(iter(made.batches("evaluation"))).inputs
    right = TorchPredictor(made.build(), made.outputs).predict(batch)["y"]
    with OnnxPredictor(fused) as predictor:
        np.testing.assert_allclose(predictor.predict(batch)["y"], right, atol=1e-5)


@pytest.mark.slow
def test_every_product_of_a_fused_graph_can_be_quantized_and_excluded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Plain().eval(), (ROWS, MASK))
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    fused = apply(Fuse(), source, made, tmp_path)
    names = graph.names_of(graph.load(fused), ("MatMul", "Gemm"))
    assert sorted(name.partition("/")[0] for name in names) == ["down", "key", "out", "query", "up", "value"]
    batch = next(iter(made.batches("evaluation"))).inputs
    with OnnxPredictor(source) as predictor:
        right = predictor.predict(batch)["y"]
    for config in (Dynamic(), Static(), Dynamic(exclude=("up/*",))):
        result = apply(config, fused, made, tmp_path / f"{config.exclude}")
        with OnnxPredictor(result) as predictor:
            got = predictor.predict(batch)["y"]
        assert 0 < np.abs(got - right).max() < 0.1 * np.abs(right).max()
        found = kernels(result, tmp_path)
        assert found.count("MultiHeadAttention") == 1
        assert sum(found.count(kind) for kind in INT8) == len(names) - bool(config.exclude)
        left = graph.names_of(graph.load(result), ("MatMul", "Gemm"))
        assert left == [name for name in names if config.exclude and name.startswith("up/")]


def test_nothing_to_fuse_is_loud_and_says_what_was_looked_for(tmp_path: Path) -> None:
    made = workload(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)).eval(), (replace(ROWS, name="input"),))
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    with pytest.raises(NoEffect, match="no attention, no GELU after a bias and no LayerNorm after a sum") as raised:
        apply(Fuse(), source, made, tmp_path)
    assert "1/LayerNormalization" in raised.value.fix


def test_another_runtime_is_refused(tmp_path: Path) -> None:
    made = workload(nn.LayerNorm(32).eval(), (replace(ROWS, name="input"),))
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    # No target has another runtime in every installation; the step must not depend on which there are.
    target = Target()
    object.__setattr__(target, "runtime", "openvino")
    context = Context(made, made.build(), target, 0, tmp_path, lambda text, fraction: None)
    with pytest.raises(BadRecipe, match="the target's runtime is openvino"):
        METHODS[Fuse].apply(Fuse(), Path(shutil.copy(source, tmp_path / "copy.onnx")), context)
