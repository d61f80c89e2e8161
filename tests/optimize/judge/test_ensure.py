"""The private copy of a step, and what is refused after it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.graph import graph
from optimize.judge import ensure
from optimize.methods.export.onnx import export
from optimize.model.errors import BadGraph, BadModel
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from serve.config.target import Target

ROW = TensorSpec("input", "float32", (BATCH, 8))


def workload() -> Workload:
    def batches() -> list[Batch]:
        return [Batch({"input": ROW.generate(np.random.default_rng(0), 6)})]

    return Workload("made", model, (ROW,), ("y",), batches, lambda outputs, targets, reference: {})


def model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, width)


def test_a_module_is_copied_deeply(tmp_path: Path) -> None:
    original = model()
    copied = ensure.copy(original, tmp_path)
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert bool(next(original.parameters()).any())


def test_a_file_is_copied_with_the_weights_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGEST_FILE", 10)
    path = export(model(), (ROW,), ["y"], tmp_path / "model.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    copied = ensure.copy(path, scratch)
    path.unlink()
    (tmp_path / "model.onnx.data").unlink()
    with OnnxPredictor(copied) as predictor:
        assert predictor.predict({"input": np.zeros((2, 8), np.float32)})["y"].shape == (2, 4)


def test_the_model_itself_passes(tmp_path: Path) -> None:
    ensure.still_works(model(), workload(), "step", Target())
    ensure.still_works(export(model(), (ROW,), ["y"], tmp_path / "model.onnx"), workload(), "step", Target())


def test_another_shape_is_refused_by_the_name_of_the_step(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"after prune\.channels, output 'y' has the shape \(6, 3\)"):
        ensure.still_works(model(3), workload(), "prune.channels", Target())
    path = export(model(3), (ROW,), ["y"], tmp_path / "model.onnx")
    with pytest.raises(BadGraph, match=r"after quantize\.static, output 'y' has the shape \(6, 3\)"):
        ensure.still_works(path, workload(), "quantize.static", Target())


def test_a_model_that_does_not_run_any_more_is_refused_by_the_name_of_the_step() -> None:
    with pytest.raises(BadModel, match=r"after prune\.channels: does not take its inputs"):
        ensure.still_works(nn.Linear(7, 4), workload(), "prune.channels", Target())


def test_values_that_are_not_finite_are_refused() -> None:
    broken = model()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(BadModel, match="NaN or infinite"):
        ensure.still_works(broken, workload(), "distill.logits", Target())


def test_a_lost_output_name_and_a_frozen_batch_are_refused(tmp_path: Path) -> None:
    other = export(model(), (ROW,), ["z"], tmp_path / "other.onnx")
    with pytest.raises(BadGraph, match=r"returns \['z'\]"):
        ensure.still_works(other, workload(), "step", Target())
    frozen = graph.load(export(model(), (ROW,), ["y"], tmp_path / "model.onnx"))
    frozen.graph.inputs[0].shape = type(frozen.graph.inputs[0].shape)([6, 8])
    graph.save(frozen, tmp_path / "frozen.onnx")
    with pytest.raises(BadGraph, match="after step: ONNX Runtime cannot run it"):
        ensure.still_works(tmp_path / "frozen.onnx", workload(), "step", Target())
