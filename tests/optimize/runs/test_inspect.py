"""What `optimize inspect` says of layers, against what can be computed by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Dim, TensorSpec, generated
from optimize.judge import macs, measure
from optimize.methods.apply import apply
from optimize.methods.export.onnx import export
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.static import Static
from optimize.runs import inspect as layers
from optimize.runs.inspect import Inspection
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from serve.config.target import Target
from tests.optimize.conftest import Optimize

WIDE = 768


@pytest.fixture(scope="module")
def exported(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return Bundle(small, small.build(), export(small.build(), small.inputs, small.outputs, path))


@pytest.fixture(scope="module")
def found(exported: Bundle) -> Inspection:
    return layers.inspect(exported, batch=8)


def test_parameters_and_macs_are_those_of_the_layers(found: Inspection) -> None:
    rows = {layer.name: layer for layer in found.layers}
    assert list(rows) == ["conv", "norm", "hidden", "wide", "out", "other"]
    assert {name: row.parameters for name, row in rows.items()} == {
        "conv": 16 * 9 + 16,
        "norm": 32,
        "hidden": 144 * WIDE + WIDE,
        "wide": WIDE * WIDE + WIDE,
        "out": WIDE * 10 + 10,
        "other": 0,
    }
    assert {name: row.macs for name, row in rows.items()} == {
        "conv": 16 * 36 * 9,
        "norm": 0,
        "hidden": 144 * WIDE,
        "wide": WIDE * WIDE,
        "out": WIDE * 10,
        "other": 0,
    }
    assert sum(row.share for row in found.layers) == pytest.approx(1)
    assert (rows["conv"].kind, rows["conv"].output, rows["out"].output) == ("Conv2d", (8, 16, 6, 6), (8, 10))


def test_the_sums_are_those_that_a_run_reports(found: Inspection, small: Workload) -> None:
    assert found.parameters == measure.parameters(small.build())
    assert found.macs == macs.total(small.build(), small.inputs)


def test_the_largest_layer_takes_the_most_time_and_all_of_it_is_accounted_for(found: Inspection) -> None:
    shares = {layer.name: layer.latency or 0.0 for layer in found.layers}
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.__getitem__) == "wide"
    assert shares["conv"] > 0
    assert found.milliseconds > 0


def test_methods_are_named_for_the_layers_that_they_match(found: Inspection) -> None:
    could = {layer.name: set(layer.methods) for layer in found.layers}
    assert {"prune.channels", "quantize.static", "quantize.dynamic"} <= could["wide"]
    assert "quantize.static" in could["conv"]
    assert "quantize.dynamic" not in could["conv"]
    assert could["norm"] == set()


@pytest.mark.slow
@pytest.mark.parametrize("step", [Dynamic(), Static()], ids=["dynamic", "static"])
def test_a_quantized_file_is_traced_back_as_well(step: object, exported: Bundle, tmp_path: Path) -> None:
    context = Context(exported.workload, exported.module, Target(cores=1), 0, tmp_path, lambda text, fraction: None)
    found = layers.inspect(replace(exported, graph=apply(step, exported.graph, context)), batch=8)
    rows = {layer.name: layer for layer in found.layers}
    assert all((rows[name].latency or 0) > 0 for name in ("hidden", "wide", "out"))
    assert not any(method.startswith("quantize.static") for method in rows["wide"].methods)
    assert "prune.channels" in rows["wide"].methods


class Stack(nn.Module):
    """Layers in a list, which is no module that is called, and a product in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x @ x.T


def test_each_product_counts_for_one_module() -> None:
    inputs = (TensorSpec("x", "float32", (Dim("batch", 1, 1, 4), 4)),)
    assert macs.by_module(Stack(), inputs) == {"": 4, "blocks.0.0": 32, "blocks.0.1": 32, "blocks.1": 16}
    assert macs.total(Stack(), inputs) == 84


SEQUENCE = (TensorSpec("input", "float32", (BATCH, 7, 16)),)
PROJECTIONS, PRODUCTS, FEED_FORWARD = 4 * 7 * 16 * 16, 2 * 7 * 7 * 16, 2 * 7 * 16 * 32


class Attending(nn.Module):
    """An encoder of torch's own behind an input of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.encoder(input)


class Scaled(nn.Module):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*[input[:, None]] * 3)[:, 0]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LSTM(16, 12), 7 * 48 * (16 + 12)),
        (nn.GRU(16, 12), 7 * 36 * (16 + 12)),
        (nn.RNN(16, 12), 7 * 12 * (16 + 12)),
        (Attending(), 2 * (PROJECTIONS + PRODUCTS + FEED_FORWARD)),
        (Scaled(), PRODUCTS),
    ],
    ids=["LSTM", "GRU", "RNN", "TransformerEncoder", "scaled_dot_product_attention"],
)
def test_recurrence_and_attention_are_counted(module: nn.Module, expected: int) -> None:
    workload = Workload("counted", module.eval(), SEQUENCE, ("y",), lambda: [], lambda *_: {})
    assert macs.total(workload.build(), SEQUENCE) == expected
    if isinstance(module, Attending):
        found = layers.inspect(Bundle(workload, workload.build()))
        assert found.macs == expected
        assert {row.name: row.macs for row in found.layers}["encoder.layers.1.linear2"] == 7 * 32 * 16


class Block(nn.Module):
    """Two convolutions with a shortcut that has one too: ONNX Runtime computes each with what stands behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(8, 64, 3, padding=1), nn.ReLU()
        self.second, self.short = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(8, 64, 1)
        self.end = nn.ReLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        inner = self.second(self.relu(self.first(input)))
        return self.end(inner + self.short(input)).mean((2, 3))


def test_a_fused_operator_counts_to_its_convolution_and_is_one_row() -> None:
    spec = TensorSpec("input", "float32", (BATCH, 8, 24, 24))
    workload = Workload("fused", Block().eval(), (spec,), ("y",), lambda: [], lambda *_: {})
    found = layers.inspect(Bundle(workload, workload.build()), batch=4)
    rows = {layer.name: layer for layer in found.layers}
    assert set(rows) == {"first", "second", "short", "other"}, (
        "a ReLU alone has a row only where it has time of its own"
    )
    # Of a convolution, a sum and a ReLU its profile names the convolution alone.
    assert (rows["first"].fused, rows["second"].fused) == (("relu",), ())
    # Nine tenths of the products are the second one's.
    assert (rows["second"].latency or 0) > 0.5
    assert (rows["first"].latency or 0) > 0 and (rows["short"].latency or 0) > 0
    assert sum(layer.latency or 0 for layer in found.layers) == pytest.approx(1)


@pytest.mark.parametrize("step", [None, Dynamic()], ids=["float", "dynamic"])
def test_the_time_of_a_recurrence_is_its_own(step: object, tmp_path: Path) -> None:
    batches = [Batch(generated(SEQUENCE, 4))]
    workload = Workload("lstm", Recurrent().eval(), SEQUENCE, ("y",), lambda: batches, lambda *_: {})
    bundle = Bundle(workload, workload.build())
    if step:
        (tmp_path / "float").mkdir()
        path = export(workload.build(), SEQUENCE, ("y",), tmp_path / "float" / "model.onnx")
        context = Context(workload, bundle.module, Target(cores=1), 0, tmp_path, lambda text, fraction: None)
        bundle = replace(bundle, graph=apply(step, path, context))
    rows = {layer.name: layer for layer in layers.inspect(bundle, batch=16).layers}
    assert (rows["lstm"].latency or 0) > 0.5
    assert (rows["head"].latency or 0) > 0


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 128, batch_first=True), nn.Linear(128, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(input)[0][:, -1])


class Odd(nn.Module):
    """Everything at once: a tied weight, a module under two names, a frozen bias, two dtypes, a layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.again = self.first
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.idle.to(torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.again(self.second(self.first(x)))
        return out


def test_what_a_method_may_stumble_over_is_said() -> None:
    module = Odd()
    said = layers.warnings(module, {"": None, "first": None, "second": None})
    assert said == (
        "one module under several names: first, again",
        "tied weights: first.weight, second.weight",
        "1 frozen parameters, which no training changes: second.bias",
        "parameters of several dtypes: float32, float64",
        "never called by name, so without an output shape: idle",
    )
    assert layers.warnings(nn.Linear(2, 2), {"": None}) == ()


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_document(
    user_file: Callable[..., str], optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    source = user_file()
    lines = optimize("inspect", source).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["wide", "Linear"] for line in lines)
    result = json.loads(optimize("inspect", source, "--batch", "4", "--json").out)
    assert [layer["name"] for layer in result["layers"]][-1] == "other"
    assert result["layers"][0]["output"] == [4, 16, 6, 6]
