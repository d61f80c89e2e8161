"""Static and dynamic INT8: what is quantized, what stays float, what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.graph import graph
from optimize.judge import measure
from optimize.judge.ruler import Until
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize import calibrate
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.static import Static
from optimize.methods.table import METHODS
from optimize.model.errors import BadData, BadGraph, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs import pipeline
from optimize.runs.recipe import Recipe
from optimize.runs.run import Terms
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

Quantize = Callable[[object, Path, Workload], Path]


def convolutional() -> nn.Module:
    """The shape of net that the digits example ends with after pruning."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)),
    ).eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(input).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 128, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.lstm(input)[0][:, -1]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(32, 64, batch_first=True), nn.Linear(64, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.out(self.gru(input)[0][:, -1])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(2000, 32), nn.Linear(32, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(input).mean(1))


def workload(module: nn.Module, spec: TensorSpec, sizes: tuple[int, ...] = (16, 16, 5)) -> Workload:
    def batches(seed: int = 0) -> list[Batch]:
        rng = np.random.default_rng(seed)
        return [Batch({"input": spec.generate(rng, size)}) for size in sizes]

    return Workload(
        "made", module, (spec,), ("y",), lambda: batches(1), lambda outputs, targets, reference: {}, batches
    )


IMAGE = TensorSpec("input", "float32", (BATCH, 1, 28, 28))
ROW = TensorSpec("input", "float32", (BATCH, 64))
WORDS = TensorSpec("input", "int64", (BATCH, Dim("words", 1, 12, 40)), values=(0, 1999))
STEPS = TensorSpec("input", "float32", (BATCH, Dim("steps", 1, 12, 40), 32))


@pytest.fixture
def quantize(tmp_path: Path) -> Quantize:
    """Export the workload's model to `source` unless it is there, and run one step on it."""

    def run(config: object, source: Path, made: Workload) -> Path:
        if not source.exists():
            export(made.build(), made.inputs, made.outputs, source)
        scratch = tmp_path / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        context = Context(made, made.build(), Target(), 0, scratch, lambda text, fraction: None)
        return Path(step.apply(config, source, context))

    return run


def kernels(path: Path, folder: Path) -> list[str]:
    """Return the operators that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def distance(path: Path, made: Workload) -> float:
    """Return the largest difference from the module, over the module's own largest output."""
    batch = next(iter(made.batches("evaluation"))).inputs
    wanted = TorchPredictor(made.build(), made.outputs).predict(batch)["y"]
    with OnnxPredictor(path) as predictor:
        got = predictor.predict(batch)["y"]
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def test_static_runs_a_convolutional_net_in_int8_but_for_its_narrow_entrance(
    quantize: Quantize, tmp_path: Path
) -> None:
    made = workload(convolutional(), IMAGE)
    path = quantize(Static(), tmp_path / "model.onnx", made)
    found = kernels(path, tmp_path)
    assert found.count("QLinearConv") == 2
    assert found.count("QGemm") == 2
    assert found.count("NhwcMaxPool") == 2, "a pooling between INT8 convolutions stays INT8, channels last"
    assert found[:2] == ["Conv", "MaxPool"], "the narrow convolution and its pooling stay float"
    assert distance(path, made) < 0.1
    parameters = sum(parameter.numel() for parameter in made.build().parameters())
    assert path.stat().st_size < 1.25 * parameters + 2000


def test_static_calibrators_all_work_on_batches_of_unequal_size(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE)
    for calibrator in ("minmax", "entropy", "percentile"):
        path = quantize(Static(calibrator=calibrator), tmp_path / "model.onnx", made)
        assert distance(path, made) < 0.2


def test_static_keeps_excluded_nodes_float(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE)
    path = quantize(Static(exclude=("4/*", "13/Gemm")), tmp_path / "model.onnx", made)
    found = kernels(path, tmp_path)
    assert (found.count("QLinearConv"), found.count("QGemm")) == (1, 1)


@pytest.mark.parametrize("calibrator", ["minmax", "percentile"])
def test_static_with_samples_of_several_lengths(quantize: Quantize, tmp_path: Path, calibrator: str) -> None:
    made = workload(Embedded(), WORDS)
    rng = np.random.default_rng(0)

    def lengths() -> list[Batch]:
        return [Batch({"input": rng.integers(0, 2000, (8, length))}) for length in (5, 9)]

    uneven = replace(made, calibration=lengths)
    path = quantize(Static(calibrator=calibrator), tmp_path / "model.onnx", uneven)  # type: ignore[arg-type]
    assert distance(path, made) < 0.2


def test_static_needs_some_samples(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE, sizes=(3,))
    with pytest.raises(BadData, match="3 calibration samples"):
        quantize(Static(), tmp_path / "model.onnx", made)


def test_static_takes_no_more_samples_than_asked() -> None:
    taken = list(calibrate.samples(workload(convolutional(), IMAGE), 16))
    assert sum(len(inputs["input"]) for inputs in taken) == 16


def test_calibration_data_that_says_nothing_is_refused(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE)
    images = next(made.batches("calibration")).inputs["input"]
    same = [Batch({"input": np.repeat(images[:1], 16, axis=0)})]
    with pytest.raises(BadData, match="all 16 calibration samples are equal"):
        quantize(Static(), tmp_path / "model.onnx", replace(made, calibration=lambda: same))
    one_class = [Batch({"input": images}, np.full(len(images), 3))]
    with pytest.raises(BadData, match="all 16 calibration samples are of one class"):
        quantize(Static(), tmp_path / "model.onnx", replace(made, calibration=lambda: one_class))
    sorted_by_class = [Batch({"input": images}, np.full(len(images), label)) for label in (0, 1)]
    quantize(Static(samples=16), tmp_path / "model.onnx", replace(made, calibration=lambda: sorted_by_class))
    numbers = [Batch({"input": images}, np.full(len(images), 0.5))]
    for batches in (sorted_by_class, numbers):
        quantize(Static(), tmp_path / "model.onnx", replace(made, calibration=lambda batches=batches: batches))


@pytest.mark.parametrize(("activations", "kind"), [("uint8", np.uint8), ("int8", np.int8)])
def test_activations_are_asymmetric_or_symmetric_as_asked(
    activations: Literal["uint8", "int8"], kind: type, quantize: Quantize, tmp_path: Path
) -> None:
    made = workload(convolutional(), IMAGE)
    path = quantize(Static(activations=activations), tmp_path / "model.onnx", made)
    assert distance(path, made) < 0.1
    nodes = list(graph.load(path).graph)
    zeros = [graph.constant(node.inputs[2]) for node in nodes if node.op_type == "QuantizeLinear"]
    assert zeros
    assert {zero.dtype for zero in zeros} == {np.dtype(kind)}
    assert activations == "uint8" or all((zero == 0).all() for zero in zeros)
    dequantized = [node.inputs[0] for node in nodes if node.op_type == "DequantizeLinear"]
    constants = {graph.constant(value).dtype for value in dequantized if value is not None and value.is_initializer()}
    assert constants == ({np.dtype(np.int8)} if activations == "int8" else {np.dtype(np.int8), np.dtype(np.int32)})


def test_activations_go_by_the_target(tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE)
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    context = Context(made, made.build(), Target(device="cuda"), 0, tmp_path, lambda text, fraction: None)
    nodes = graph.load(METHODS[Static].apply(Static(), source, context)).graph
    assert all((graph.constant(node.inputs[2]) == 0).all() for node in nodes if node.op_type == "QuantizeLinear")


def test_calibration_data_with_nan_is_refused(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(convolutional(), IMAGE)
    batch = np.zeros((16, 1, 28, 28), np.float32)
    batch[3] = np.nan
    with pytest.raises(BadData, match="NaN or infinite value in sample 3"):
        quantize(Static(), tmp_path / "model.onnx", replace(made, calibration=lambda: [Batch({"input": batch})]))


def test_dynamic_quantizes_dense_layers_and_tables(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Embedded(), WORDS)
    path = quantize(Dynamic(), tmp_path / "model.onnx", made)
    assert "DynamicQuantizeMatMul" in kernels(path, tmp_path)
    assert distance(path, made) < 0.1
    # A byte for each of 32 values and four for their scale.
    assert path.stat().st_size < 0.3 * (tmp_path / "model.onnx").stat().st_size


def test_dynamic_counts_a_tied_weight_once_and_transposes_it_once(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Tied().eval(), ROW)
    path = quantize(Dynamic(), tmp_path / "model.onnx", made)
    assert kernels(path, tmp_path).count("DynamicQuantizeMatMul") == 2
    assert distance(path, made) < 0.1
    assert path.stat().st_size < 64 * 64 + 3000


@pytest.mark.slow
def test_dynamic_quantizes_lstms_and_is_faster(quantize: Quantize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Recurrent().eval(), STEPS)
    source = tmp_path / "model.onnx"
    path = quantize(Dynamic(), source, made)
    assert kernels(path, tmp_path).count("DynamicQuantizeLSTM") == 2
    assert distance(path, made) < 0.1
    assert path.stat().st_size < 0.27 * source.stat().st_size
    files, target = {"float": source, "int8": path}, Target(batch=(16,), cores=1)
    speeds = measure.speed(files, made.inputs, target, until=Until(seconds=5.0))
    assert speeds.ratios("int8", "float")[16].high > 1


@pytest.mark.slow
def test_a_gru_stays_float_and_what_follows_does_not(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Gated().eval(), STEPS)
    found = kernels(quantize(Dynamic(), tmp_path / "model.onnx", made), tmp_path)
    assert "GRU" in found
    assert "DynamicQuantizeMatMul" in found
    with pytest.raises(NoEffect, match="no weight is left to quantize"):
        quantize(Dynamic(exclude=("out/*",)), tmp_path / "model.onnx", made)


def test_dynamic_keeps_excluded_nodes_float(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Tied().eval(), ROW)
    source = tmp_path / "model.onnx"
    whole = quantize(Dynamic(), source, made).stat().st_size
    name = graph.names_of(graph.load(source), ["Gemm"])[0]
    path = quantize(Dynamic(exclude=(name,)), source, made)
    assert kernels(path, tmp_path).count("DynamicQuantizeMatMul") == 1
    assert path.stat().st_size > whole + 3 * 64 * 64


def test_steps_in_a_row_each_take_what_the_one_before_left(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Embedded(), WORDS)
    source = tmp_path / "model.onnx"
    export(made.build(), made.inputs, made.outputs, source)
    (dense,) = graph.names_of(graph.load(source), ("MatMul", "Gemm"))
    once = Path(shutil.copy(quantize(Dynamic(exclude=(dense,)), source, made), tmp_path / "once.onnx"))
    assert kernels(once, tmp_path).count("DynamicQuantizeMatMul") == 0
    twice = Path(shutil.copy(quantize(Dynamic(), once, made), tmp_path / "twice.onnx"))
    assert kernels(twice, tmp_path).count("DynamicQuantizeMatMul") == 1
    assert distance(twice, made) < 0.1
    with pytest.raises(BadGraph, match="is quantized already"):
        quantize(Dynamic(), twice, made)


def test_a_table_has_a_scale_for_each_row(quantize: Quantize, tmp_path: Path) -> None:
    module = Embedded()
    with torch.no_grad():
        module.table.weight[0] *= 1000
    made = workload(module, WORDS)
    path = quantize(Dynamic(), tmp_path / "model.onnx", made)
    rows = {"input": np.full((1, 4), 9)}
    wanted = TorchPredictor(made.build(), made.outputs).predict(rows)["y"]
    with OnnxPredictor(path) as predictor:
        got = predictor.predict(rows)["y"]
    # One scale for the whole table would leave nothing of row 9.
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("config", [Static(), Dynamic()])
def test_a_quantized_graph_is_not_quantized_again(config: object, quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Tied().eval(), ROW)
    once = quantize(config, tmp_path / "model.onnx", made)
    again = shutil.copy(once, tmp_path / "once.onnx")
    for other in (Static(), Dynamic()):
        with pytest.raises(BadGraph, match="is quantized already"):
            quantize(other, Path(again), made)


@pytest.mark.parametrize("config", [Static(), Dynamic()])
def test_a_graph_without_weights_has_nothing_to_quantize(config: object, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(NoEffect, match="the model has no weight that this method takes"):
        quantize(config, tmp_path / "model.onnx", workload(nn.ReLU(), ROW))


@pytest.mark.parametrize("config", [Static(exclude=("nothing*",)), Dynamic(exclude=("nothing*",))])
def test_a_glob_that_matches_nothing_is_loud(config: object, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(NoEffect, match=r"no node matches 'nothing\*'") as raised:
        quantize(config, tmp_path / "model.onnx", workload(Tied().eval(), ROW))
    assert "one/Gemm" in raised.value.fix or "two/Gemm" in raised.value.fix


def test_the_file_keeps_names_and_dynamic_axes_and_sheds_the_rest(quantize: Quantize, tmp_path: Path) -> None:
    made = workload(Embedded(), WORDS)
    for config in (Static(), Dynamic()):
        proto = onnx.load(quantize(config, tmp_path / "model.onnx", made))
        onnx.checker.check_model(proto, full_check=True)
        assert [value.name for value in proto.graph.input] == ["input"]
        assert [value.name for value in proto.graph.output] == ["y"]
        assert [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", "words"]
        assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert not proto.graph.value_info
        assert max(len(tensor.name) for tensor in proto.graph.initializer) <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_nodes_keep_their_names_until_the_last_step_of_a_recipe(small: Workload, tmp_path: Path) -> None:
    steps = (Dynamic(exclude=("hidden/*", "out/*")), Dynamic(exclude=("hidden/*",)))
    pipeline.run(Recipe(steps), small, output=tmp_path / "run", terms=Terms(force=True))

    def names(number: int) -> list[str | None]:
        (folder,) = (tmp_path / "run").glob(f"{number}-*")
        return [node.name for node in graph.load(folder / "model.onnx").graph]

    assert {"conv/Conv", "hidden/Gemm_MatMul", "out/Gemm_MatMul"} <= set(names(2))
    assert not any(names(3))
