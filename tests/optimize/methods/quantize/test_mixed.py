"""Mixed precision: which layers stay float, why, and when there is nothing to find."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Array, Arrays, TensorSpec
from optimize.judge import effect as sensitivity
from optimize.judge.evaluate import evaluate
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize.mixed import Mixed
from optimize.model.errors import BadRecipe, NoEffect
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

WIDTH = 1024
ROW = TensorSpec("input", "float32", (BATCH, 32))


class Outlier(nn.Module):
    """The last layer is given one channel that is thousands of times the others, and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(32, 128), nn.Linear(128, WIDTH), nn.Linear(WIDTH, 10)
        with torch.no_grad():
            self.second.weight[0] *= 2000
            self.last.weight[:, 0] = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(input).relu()))


def batches(seed: int = 0) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        inputs = rng.normal(size=(64, 32)).astype(np.float32)
        with torch.inference_mode():
            yield Batch({"input": inputs}, Outlier()(torch.from_numpy(inputs)).numpy().argmax(1))


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    return {"accuracy": outputs["y"].argmax(1) == targets}


@pytest.fixture(scope="module")
def made() -> Workload:
    return Workload("outlier", Outlier(), (ROW,), ("y",), batches, scores, calibration=lambda: batches(1), bounded=True)


@pytest.fixture(scope="module")
def exported(made: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(made.build(), made.inputs, made.outputs, tmp_path_factory.mktemp("float") / "model.onnx")


Search = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def search(made: Workload, exported: Path, tmp_path: Path) -> Search:
    def run(config: Mixed, workload: Workload = made, trained: nn.Module | None = None) -> tuple[Path, list[str]]:
        said: list[str] = []
        scratch = tmp_path / str(len(list(tmp_path.iterdir())))
        scratch.mkdir()
        teacher = trained or made.build()
        context = Context(workload, teacher, Target(cores=1), 0, scratch, lambda text, _: said.append(text))
        return step.apply(config, exported, context), said

    return run


def float_weights(path: Path) -> list[tuple[int, ...]]:
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return sorted(array.shape for array in arrays if array.ndim == 2 and array.dtype == np.float32)


def accuracy(path: Path, workload: Workload) -> float:
    with OnnxPredictor(path) as predictor:
        return evaluate(predictor, workload).scores[0].value


def test_only_the_layer_with_the_outlier_stays_float(search: Search, made: Workload) -> None:
    everything, _ = search(Mixed(max_drop=1.0))
    assert float_weights(everything) == []
    assert accuracy(everything, made) < 0.9, "or there were nothing to search for"
    path, said = search(Mixed(max_drop=0.1))
    assert [sorted(shape) for shape in float_weights(path)] == [[10, WIDTH]]
    assert accuracy(path, made) >= 0.9
    assert "quantize.mixed: stays float: last/Gemm" in said
    assert any("every layer in INT8: accuracy" in line and "not kept" in line for line in said)
    assert any("last/Gemm alone in INT8 loses +0." in line for line in said)


def test_the_others_may_have_8_bit_weights(search: Search, made: Workload) -> None:
    floats, _ = search(Mixed(max_drop=0.2))
    path, said = search(Mixed(max_drop=0.2, weight_only=True))
    assert float_weights(path) == [(10, WIDTH // 32)], "only the scales of the blocks"
    assert path.stat().st_size < floats.stat().st_size - 2.5 * WIDTH * 10
    assert accuracy(path, made) >= 0.8
    assert "quantize.mixed: stays float: none" in said
    assert any("last/Gemm with 8-bit weights: accuracy" in line for line in said)


def test_ranges_may_come_from_each_batch(search: Search, made: Workload) -> None:
    path, _ = search(
        Mixed(max_drop=0.02, ranges="dynamic"), replace(made, calibration=None, selection=lambda: batches(2))
    )
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    assert accuracy(path, made) >= 0.98


def test_excluded_layers_are_no_candidates(search: Search) -> None:
    path, said = search(Mixed(max_drop=0.02, exclude=("first/*", "last/*")))
    assert len(float_weights(path)) == 2
    assert any("every layer in INT8" in line and line.endswith(": kept") for line in said)


class Doubled(Outlier):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_budget_that_no_assignment_keeps_is_loud(search: Search, made: Workload) -> None:
    def distance(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
        return {"distance": np.abs(outputs["y"] - reference["y"]).mean(1)}

    strict = replace(made, scores=distance, bounded=False, higher_is_better={"distance": False})
    with pytest.raises(NoEffect, match="no assignment with a layer in INT8 keeps the budget"):
        search(Mixed(max_drop=1e-5), strict)
    with pytest.raises(NoEffect, match="the float model breaks the budget by itself"):
        search(Mixed(max_drop=0.001), strict, Doubled())


def test_the_search_reads_no_evaluation_sample(search: Search, made: Workload) -> None:
    """Labels that are all wrong would let no assignment pass, if they judged."""
    wrong = replace(made, evaluation=lambda: (Batch(x.inputs, (x.targets + 1) % 10) for x in batches()))
    path, _ = search(Mixed(max_drop=0.1), wrong)
    assert [sorted(shape) for shape in float_weights(path)] == [[10, WIDTH]]


def test_the_budget_must_suit_the_metric(search: Search, made: Workload) -> None:
    with pytest.raises(BadRecipe, match="keep and max_drop are both given"):
        search(Mixed(max_drop=0.1, keep=0.9))
    with pytest.raises(BadRecipe, match="needs a metric in"):
        search(Mixed(), replace(made, bounded=False))
    with pytest.raises(BadRecipe, match="of 'accuracy' less is better"):
        search(Mixed(), replace(made, higher_is_better={"accuracy": False}))


def test_gain_is_the_share_of_multiplications_and_bytes(small: Workload, tmp_path: Path) -> None:
    path = export(small.build(), small.inputs, small.outputs, tmp_path / "model.onnx")
    names = ["conv/Conv", "hidden/Gemm", "wide/Gemm", "out/Gemm"]
    gain = sensitivity.gains(path, names, small.inputs)
    # Weights with their biases; the convolution (16 filters of 9 points) works at 36 places.
    sizes = np.array([144 + 16, 144 * 768 + 768, 768 * 768 + 768, 7680 + 10])
    work = sizes * [36, 1, 1, 1]
    assert list(gain.values()) == pytest.approx(sizes / sizes.sum() + work / work.sum())
    assert sum(gain.values()) == pytest.approx(2)
