"""What is counted is counted exactly; what is timed is compared, never held against a clock."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize.graph import graph
from optimize.judge import macs, measure
from optimize.judge.measure import Cost
from optimize.judge.ruler import Speeds, Until
from optimize.methods.export.onnx import export
from optimize.model.errors import BadGraph
from optimize.predict import runtimes as predict
from optimize.predict.onnxruntime import OnnxPredictor
from serve.config.target import Target

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
    assert macs.total(module, inputs) == expected


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


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down tenfold half-way; the file stays twice as fast throughout.
    slow = [1.0] * 5 + [10.0] * 5
    made = Speeds({"base": {8: slow}, "fast": {8: [value / 2 for value in slow]}})
    ratio = made.ratios("fast", "base")[8]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert made.ratios("base", "base")[8].value == 1.0
    assert made.latency_ms("fast") == {8: pytest.approx(2750)}
    assert made.throughput("fast") == {8: pytest.approx(8 / 2.75)}


def test_speed_tells_a_large_model_from_a_small_one(small: Path, tmp_path: Path) -> None:
    files = {"large": export(dense(8192), ROW, ["y"], tmp_path / "large.onnx"), "small": small}
    target = Target(cores=1, batch=(1, 16))
    made = measure.speed(files, ROW, target)
    for batch, ratio in made.ratios("small", "large").items():
        assert ratio.low > 2, f"at batch {batch}, 128 times the work"
    assert set(made.latency_ms("large")) == {1, 16}


def test_one_file_at_a_time_is_opened_anew_in_every_round(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: Path(shutil.copy(small, tmp_path / f"{name}.onnx")) for name in ("a", "b")}
    opened: list[str] = []
    now: list[str] = []

    class Noting(OnnxPredictor):
        def __init__(self, path: Path, device: str, cores: int) -> None:
            assert not now, "another file is open"
            now.append(path.stem)
            opened.append(path.stem)
            super().__init__(path, device, cores)

        def __exit__(self, *exception: object) -> None:
            now.pop()
            super().__exit__(*exception)

    rests: list[float] = []
    monkeypatch.setitem(predict.RUNTIMES, "onnxruntime", Noting)
    monkeypatch.setattr(time, "sleep", rests.append)
    measure.speed(files, ROW, Target(cores=1, batch=(1, 4)), until=Until(rounds=2))
    assert [sorted(opened[:3]), sorted(opened[3:])] == [["a", "a", "b"]] * 2, "the first file twice, for the control"
    assert rests == [measure.REST] * 6
    assert not now


def test_the_fastest_call_counts_after_three_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0, 9, 10, 12, 13, 18, 20])

    class Calls:
        def predict(self, inputs: Arrays) -> dict[str, Array]:
            return {}

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure.timed(Calls(), {1: {}}) == {1: 2.0}  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timed
def test_a_file_against_itself_is_1(small: Path, tmp_path: Path) -> None:
    files = {name: Path(shutil.copy(small, tmp_path / f"{name}.onnx")) for name in ("a", "b")}
    speeds = measure.speed(files, ROW, Target(batch=(1, 16)), until=Until(decide=["b"], patience=15.0))
    for found in (speeds.ratios("b", "a"), speeds.control()):
        for ratio in found.values():
            assert not ratio.senseless
            assert ratio.value == pytest.approx(1, abs=0.07)


def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no")
    with pytest.raises(BadGraph, match=r"broken\.onnx"):
        measure.speed({"broken": broken}, ROW, Target(batch=(1,)))
