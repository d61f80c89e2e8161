"""What is counted is counted exactly; what is timed is compared, never held against a clock."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from loadtest.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize import measure, predict
from optimize.errors import BadGraph
from optimize.export import graph
from optimize.export.onnx import export
from optimize.measure import Cost, Speeds
from serve.target import Target

ROW = (TensorSpec("input", "float32", (BATCH, 64)),)

SEQUENCE = (TensorSpec("input", "float32", (BATCH, 7, 5)),)


class Attention(nn.Module):
    def forward(self, query: torch.Tensor) -> torch.Tensor:
        return torch.softmax(query @ query.transpose(1, 2), -1) @ query


def dense(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(dense(64), ROW, ["y"], tmp_path_factory.mktemp("small") / "small.onnx")


def test_parameters_count_a_shared_one_once() -> None:
    layer = nn.Linear(10, 10)
    assert measure.parameters(nn.Sequential(layer, nn.ReLU(), layer)) == 110


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (nn.Linear(64, 32), ROW, 64 * 32),
        (nn.Conv2d(3, 8, 3, padding=1), (TensorSpec("input", "float32", (BATCH, 3, 10, 10)),), 10 * 10 * 8 * 3 * 9),
        (nn.LSTM(5, 6, 2, bidirectional=True), SEQUENCE, 2 * 7 * 24 * (5 + 6) + 2 * 7 * 24 * (12 + 6)),
        (nn.GRU(5, 6), SEQUENCE, 7 * 18 * (5 + 6)),
        (Attention(), (TensorSpec("query", "float32", (BATCH, Dim("tokens", 1, 12, 40), 8)),), 2 * 12 * 12 * 8),
    ],
)
def test_macs_of_one_typical_sample(module: nn.Module, inputs: tuple[TensorSpec, ...], expected: int) -> None:
    assert measure.macs(module, inputs) == expected


def test_bytes_include_the_weights_beside_the_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure.file_bytes(small) == small.stat().st_size
    monkeypatch.setattr(graph, "LARGEST_FILE", 100)
    two = export(dense(64), ROW, ["y"], tmp_path / "two.onnx")
    beside = tmp_path / "two.onnx.data"
    assert measure.file_bytes(two) == two.stat().st_size + beside.stat().st_size
    (tmp_path / "two.onnx.tmp").write_bytes(b"not the model's")
    assert measure.file_bytes(two) == two.stat().st_size + beside.stat().st_size


def test_cost_document_has_string_keys() -> None:
    document = Cost(10, 2, 3, {1: 0.5, 32: 4.0}, {1: 2000.0, 32: 8000.0}).document()
    assert document == {
        "bytes": 10,
        "parameters": 2,
        "macs": 3,
        "latency_ms": {"1": 0.5, "32": 4.0},
        "throughput": {"1": 2000.0, "32": 8000.0},
    }


def speeds(**seconds: list[float]) -> Speeds:
    rounds: Mapping[str, Mapping[int, list[float]]] = {name: {8: values} for name, values in seconds.items()}
    return Speeds(rounds)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down tenfold half-way; the file stays twice as fast throughout.
    slow = [1.0, 1.0, 1.0, 10.0, 10.0, 10.0]
    made = speeds(base=slow, fast=[value / 2 for value in slow])
    ratio = made.ratios("fast", "base")[8]
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert made.ratios("base", "base")[8].value == 1.0
    assert made.latency_ms("fast") == {8: pytest.approx(2750)}
    assert made.throughput("fast") == {8: pytest.approx(8 / 2.75)}


def test_the_interval_widens_with_noise_and_holds_the_median() -> None:
    rng = np.random.default_rng(0)
    base = [1.0] * 25
    calm = speeds(base=base, fast=list(0.5 * rng.lognormal(0, 0.02, 25)))
    noisy = speeds(base=base, fast=list(0.5 * rng.lognormal(0, 0.3, 25)))
    calm_ratio, noisy_ratio = calm.ratios("fast", "base")[8], noisy.ratios("fast", "base")[8]
    assert noisy_ratio.high - noisy_ratio.low > 3 * (calm_ratio.high - calm_ratio.low) > 0
    for ratio in (calm_ratio, noisy_ratio):
        assert ratio.low <= ratio.value <= ratio.high
    assert noisy.ratios("fast", "base") == noisy.ratios("fast", "base"), "the bootstrap is seeded"


def test_speed_tells_a_large_model_from_a_small_one(small: Path, tmp_path: Path) -> None:
    files = {"large": export(dense(8192), ROW, ["y"], tmp_path / "large.onnx"), "small": small}
    target = Target(cores=1, batch=(1, 16))
    made = measure.speed(files, ROW, target, rounds=5)
    for batch, ratio in made.ratios("small", "large").items():
        assert ratio.low > 2, f"at batch {batch}, 128 times the work"
    assert set(made.latency_ms("large")) == {1, 16}
    assert all(len(rounds) == 5 for batches in made.seconds.values() for rounds in batches.values())


def test_speed_stops_when_its_time_is_up(small: Path) -> None:
    files = {"only": small}
    made = measure.speed(files, ROW, Target(cores=1, batch=(1,)), rounds=1000, seconds=0.0)
    assert len(made.seconds["only"][1]) == measure.FEWEST_ROUNDS


def test_every_block_rests_and_warms_up_first(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: Path(shutil.copy(small, tmp_path / f"{name}.onnx")) for name in ("a", "b")}
    order: list[str] = []

    class Noting(predict.OnnxPredictor):
        def __init__(self, path: Path, device: str, cores: int) -> None:
            super().__init__(path, device, cores)
            self.path = path

        def predict(self, inputs: Arrays) -> dict[str, Array]:
            order.append(self.path.stem)
            return super().predict(inputs)

    rests: list[float] = []
    monkeypatch.setitem(predict.RUNTIMES, "onnxruntime", Noting)
    monkeypatch.setattr(time, "sleep", rests.append)
    measure.speed(files, ROW, Target(cores=1, batch=(4,)), rounds=2, seconds=60.0)
    blocks = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert blocks == ["a", "b", "a", "b", "a"], "one block each to warm up, then forth, then back"
    assert rests == [measure.REST] * 6


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no")
    with pytest.raises(BadGraph, match=r"broken\.onnx"):
        measure.speed({"broken": broken}, ROW, Target(batch=(1,)))
