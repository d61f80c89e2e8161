"""Values of different ranges under one INT8 scale: what joins them stays float by itself."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize.static import Static
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

IMAGE = TensorSpec("image", "float32", (BATCH, 3, 16, 16), (-1, 1))


class Joined(nn.Module):
    """Two heads of one body: `large` in the hundreds, `small` between 0 and 1, and the way that they come together."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        self.large, self.small, self.way = nn.Conv2d(24, 4, 1), nn.Conv2d(24, 3, 1), way
        self.register_buffer("factor", torch.tensor([640.0] * 4 + [1.0] * 3)[:, None, None])
        with torch.no_grad():
            self.small.weight *= 4

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.body(image)
        large, small = self.large(x).sigmoid(), self.small(x).sigmoid()
        if self.way == "concatenated":
            return torch.cat([large * 640, small], 1)
        if self.way == "turned after":
            return torch.cat([large.flatten(2) * 640, small.flatten(2)], 1).transpose(1, 2)
        if self.way == "scaled by channel":
            return torch.cat([large, small], 1) * self.factor
        seen = (image.sum(1, keepdim=True) > 0).float()
        if self.way == "added mask":
            return (small - (1 - seen) * 1e9).sigmoid()
        if self.way == "masked":
            return torch.where(seen > 0, small, -1e9).amax((2, 3))
        return torch.cat([large, small], 1)


WAYS = {
    # Which operators stay float, and which outputs are the small ones.
    "concatenated": ({"Concat"}, slice(4, None), 1),
    "turned after": ({"Concat", "Transpose"}, slice(4, None), 2),
    "scaled by channel": ({"Mul"}, slice(4, None), 1),
    "added mask": ({"Sub", "Sigmoid"}, slice(None), 1),
    "masked": ({"Where"}, slice(None), 1),
    "alike": (set(), slice(None), 1),
}


def made(way: str) -> Workload:
    torch.manual_seed(0)
    module = Joined(way).eval()

    def batches(seed: int = 1) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        yield Batch({"image": IMAGE.generate(rng, 16)})

    return Workload("joined", module, (IMAGE,), ("y",), batches, lambda o, t, r: {}, calibration=lambda: batches(2))


def quantized(config: object, source: Path, load: Workload, scratch: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    scratch.mkdir()
    context = Context(load, load.build(), Target(cores=1), 0, scratch, lambda text, _: said.append(text))
    return step.apply(config, source, context), said


@pytest.mark.parametrize("way", WAYS)
def test_small_values_survive_large_ones(way: str, tmp_path: Path) -> None:
    kinds, part, axis = WAYS[way]
    load = made(way)
    source = export(load.build(), load.inputs, load.outputs, tmp_path / "model.onnx")
    path, said = quantized(Static(), source, load, tmp_path / "scratch")
    inputs = load.first()
    where = (slice(None),) * axis + (part,)
    wanted = TorchPredictor(load.build(), load.outputs).predict(inputs)["y"][where]
    with OnnxPredictor(path) as predictor:
        got = predictor.predict(inputs)["y"][where]
    assert np.ptp(wanted) > 0.1
    assert np.abs(got - wanted).mean() < np.ptp(wanted) / 15
    told = [line for line in said if "values of different ranges meet" in line]
    assert bool(told) == bool(kinds)
    assert all(kind in told[0] for kind in kinds)
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node) >= 3, "the layers are in INT8"


def test_one_scale_for_both_would_wipe_the_small_ones_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or there were nothing to leave float."""
    monkeypatch.setattr("optimize.methods.quantize.joins.apart", lambda *_: [])
    load = made("concatenated")
    source = export(load.build(), load.inputs, load.outputs, tmp_path / "model.onnx")
    path, _ = quantized(Static(), source, load, tmp_path / "scratch")
    with OnnxPredictor(path) as predictor:
        small = predictor.predict(load.first())["y"][:, 4:]
    assert len(np.unique(small)) <= 2


Build = Callable[[], nn.Module]


class Tabular(nn.Module):
    """A layer that reads numbers in thousands beside numbers below 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.joined, self.out = nn.Linear(8, 64), nn.Linear(68, 64), nn.Linear(64, 4)
        with torch.no_grad():
            self.joined.weight[:, 64:] /= 5000

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        rows = image.flatten(1)
        x = torch.cat([self.first(rows[:, :8]).sigmoid(), rows[:, 8:12] * 5000], 1)
        return self.out(self.joined(x).relu())


def test_a_layer_that_reads_both_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    load = made("alike")
    module = Tabular().eval()
    load = Workload("tabular", module, (IMAGE,), ("y",), load.evaluation, load.scores, calibration=load.calibration)
    source = export(module, load.inputs, load.outputs, tmp_path / "model.onnx")
    path, said = quantized(Static(), source, load, tmp_path / "scratch")
    assert any("different ranges meet" in line and "joined/Gemm" in line for line in said)
    wanted = TorchPredictor(module, load.outputs).predict(load.first())["y"]
    with OnnxPredictor(path) as predictor:
        got = predictor.predict(load.first())["y"]
    assert np.abs(got - wanted).mean() < 0.03 * np.ptp(wanted)
