"""A weight that a model uses twice stands in its file once, before and after a quantizer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, TensorSpec
from optimize.graph import graph
from optimize.judge import measure
from optimize.methods.export.onnx import export
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.half import Half
from optimize.methods.quantize.nncf import Nncf
from optimize.methods.quantize.static import Static
from optimize.methods.quantize.weight_only import WeightOnly
from tests.optimize.methods.quantize.test_quantize import Quantize, distance, kernels, quantize, workload

__all__ = ["quantize"]

WORDS, WIDTH = 1000, 32
TOKENS = TensorSpec("input", "int64", (BATCH, 9), (0, WORDS - 1))
ROW = TensorSpec("input", "float32", (BATCH, WIDTH))


class Tied(nn.Module):
    """Looks words up in a table and scores all words by what `way` makes of the same table."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.words, self.body, self.way = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), way
        self.head = nn.Linear(WIDTH, WORDS, bias=way == "pooled")
        self.head.weight = self.words.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.body(self.words(input)).relu()
        if self.way == "scaled":
            return functional.linear(x, self.words.weight / 8)
        if self.way == "convolution":
            return functional.conv1d(x.transpose(1, 2), self.words.weight[..., None])
        if self.way == "part":
            return functional.linear(x, self.words.weight[: WORDS // 2])
        return self.head(x.mean(1) if self.way == "pooled" else x)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, WORDS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.encode(input).relu() @ self.encode.weight


MODELS: dict[str, tuple[Callable[[], nn.Module], TensorSpec, int]] = {
    # The code, its input, and how many bytes INT8 needs for each number: scales of another axis ask for another form.
    "sequence": (lambda: Tied("sequence"), TOKENS, 1),
    "pooled": (lambda: Tied("pooled"), TOKENS, 1),
    "convolution": (lambda: Tied("convolution"), TOKENS, 1),
    "scaled": (lambda: Tied("scaled"), TOKENS, 2),
    "part": (lambda: Tied("part"), TOKENS, 2),
    "autoencoder": (Autoencoder, ROW, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tied_weight_stands_in_the_file_once(name: str, quantize: Quantize, tmp_path: Path) -> None:
    build, spec, each = MODELS[name]
    torch.manual_seed(0)
    made = workload(build().eval(), spec)
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    assert distance(source, made) < 1e-5
    parameters = measure.parameters(made.build())
    assert source.stat().st_size < 4 * parameters + 5000
    path = quantize(Static() if name == "convolution" else Dynamic(), source, made)
    assert not {"MatMul", "Gemm", "Conv"} & set(kernels(path, tmp_path)), "everything is in INT8"
    assert distance(path, made) < 0.1
    # The scales are the rest: four bytes for each row.
    assert path.stat().st_size < each * parameters + 8 * WORDS + 6000


@pytest.mark.parametrize(
    ("config", "each"),
    [
        *[(Dynamic(reduce_range=True), 1), (Static(), 1), (Half(), 2), (WeightOnly(weights="float"), 5)],
        # A scale for each block of 32 numbers.
        *[(WeightOnly(), 1.13), (WeightOnly(symmetric=False), 1.17)],
        *[(WeightOnly(weights="int4", tables="int4"), 0.65), (Nncf(), 1)],
    ],
    ids=["7 bits", "static", "half", "table only", "blocks", "blocks with zero points", "4 bits", "nncf"],
)
def test_it_stays_one_whatever_it_is_stored_in(config: object, each: int, quantize: Quantize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Tied("sequence").eval(), TOKENS)
    path = quantize(config, tmp_path / "model.onnx", made)
    assert distance(path, made) < 0.1
    assert "MatMul" not in kernels(path, tmp_path) or not isinstance(config, Dynamic | Static)
    assert path.stat().st_size < each * measure.parameters(made.build()) + 8 * WORDS + 6000


def test_weights_of_one_use_are_folded_as_before(tmp_path: Path) -> None:
    module = nn.Sequential(nn.LSTM(WIDTH, 64, batch_first=True))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = module, nn.Linear(64, 512)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(input)[0])

    spec = TensorSpec("input", "float32", (BATCH, 7, WIDTH))
    path = export(Last().eval(), (spec,), ("y",), tmp_path / "model.onnx")
    weights = {tensor.name for tensor in onnx.load(path).graph.initializer}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type in ("LSTM", "MatMul")]
    assert {node.op_type for node in nodes} == {"LSTM", "MatMul"}
    assert all(node.input[1] in weights for node in nodes)


def test_every_form_is_written_out_for_a_quantizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export(Tied("sequence").eval(), (TOKENS,), ("y",), tmp_path / "model.onnx")
    assert len(graph.names_of(graph.load(path), ("MatMul",))) == 1
    whole = graph.quantizable(path)
    assert len(graph.names_of(whole, ("MatMul",))) == 2
    shapes = sorted(tuple(value.shape) for value in whole.graph.initializers.values() if len(value.shape) == 2)
    assert shapes == [(WIDTH, WIDTH), (WIDTH, WORDS), (WORDS, WIDTH)]
    again = graph.save(whole, tmp_path / "whole.onnx")
    assert again.stat().st_size > 1.9 * path.stat().st_size
    graph.clean(whole)
    assert graph.save(whole, again).stat().st_size < path.stat().st_size + 1000
    assert np.isfinite(distance(again, workload(Tied("sequence").eval(), TOKENS)))
