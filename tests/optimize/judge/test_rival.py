"""A candidate beside the live version: both judged on the same samples, and what is better is said."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from optimize.judge import rival, ruler
from optimize.judge.evaluate import evaluate
from optimize.judge.rival import Candidate
from optimize.judge.ruler import Speeds
from optimize.methods.export.onnx import export
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.specs import output_specs
from optimize.runs.baseline import silent
from optimize.source.workload import Workload
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source

TARGET = Target(batch=(1, 8), cores=1)


@pytest.fixture(scope="module")
def candidate(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """A model that always answers the same label."""
    module = small.build()
    with torch.no_grad():
        module.out.weight.zero_()  # type: ignore[operator, union-attr]
    return judged(small, module, tmp_path_factory.mktemp("candidate"))


@pytest.fixture(scope="module")
def trained(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return judged(small, small.build(), tmp_path_factory.mktemp("trained"))


def judged(workload: Workload, module: torch.nn.Module, folder: Path) -> Candidate:
    graph = export(module.eval(), workload.inputs, workload.outputs, folder / "model.onnx")
    reference = evaluate(TorchPredictor(workload.build(), workload.outputs), workload).outputs
    with OnnxPredictor(graph) as onnx:
        return Candidate(workload, graph, evaluate(onnx, workload, reference), reference, TARGET)


@pytest.fixture
def place(small: Workload, trained: Candidate, tmp_path: Path) -> Path:
    """A repository in which the trained model is live."""
    specs = output_specs(small, trained.graph, trained.quality.outputs)
    with staging.stage(
        tmp_path / "repository", "small", Source(trained.graph, small.inputs, tuple(specs)), TARGET
    ) as staged:
        staging.publish(staged, {})
    return tmp_path / "repository"


def ratio(monkeypatch: pytest.MonkeyPatch, candidate: float, control: float = 1.0) -> None:
    """Let the ruler say this of the candidate, and of the live version against itself; both files are run though."""

    def rounds(visit: ruler.Visit, names: Sequence[str], *, baseline: str, **_how: object) -> Speeds:
        factors = {baseline: 1.0, rival.NEW: candidate, ruler.CONTROL: control}
        batches = {name: list(visit(name)) for name in names}[baseline]
        seconds = {name: {batch: [1 / value] * 9 for batch in batches} for name, value in factors.items()}
        return Speeds(seconds, baseline)

    monkeypatch.setattr(ruler, "alternate", rounds)


def test_a_live_version_that_is_better_and_faster_is_said_to_be(
    candidate: Candidate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio(monkeypatch, 0.5)
    number = rival.find(place, "small")
    assert number == 1
    found = rival.against(place, number, candidate, silent)
    quality = found["quality"]
    assert quality["live"] > 0.8 > 0.5 > quality["candidate"]
    assert quality["verdict"] == "worse" and quality["high"] < 0
    assert set(found["speed"]) == {"1", "8"} and found["speed"]["8"]["value"] == pytest.approx(0.5)
    assert found["size"] == pytest.approx(1, abs=0.05)
    assert 0 < found["answers"]["labels"] < found["answers"]["samples"] == 397
    metric, speed = found["better"]
    assert metric.startswith("its accuracy is 0.8") and "the candidate's 0." in metric
    assert speed.startswith("it is faster: the candidate has 0.50×")


def test_a_live_version_that_is_better_in_nothing_raises_no_alarm(
    trained: Candidate, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratio(monkeypatch, 2.0)
    found = rival.against(place, 1, trained, silent)
    assert found["better"] == []
    assert found["quality"]["verdict"] == "undecided"
    assert found["answers"]["labels"] == 0
    assert any("2.00× [2.00, 2.00] its throughput at batch 1" in line for line in found["told"])


def test_a_busy_machine_gives_no_speeds(candidate: Candidate, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio(monkeypatch, 0.5, control=2.0)
    found = rival.against(place, 1, candidate, silent)
    assert found["unmeasured"] == "not measured: the machine is too busy"
    assert found["speed"] == {} and len(found["better"]) == 1
    assert "speed not measured: the machine is too busy" in found["told"]


def test_what_cannot_be_compared_is_said(candidate: Candidate, place: Path) -> None:
    renamed = (replace(candidate.workload.inputs[0], name="picture"),)
    other = replace(candidate, workload=replace(candidate.workload, inputs=renamed))
    graph = place / "small" / "1" / "model.onnx"
    assert rival.against(place, 1, other, silent)["unknown"] == "version 1 takes image, not picture"
    graph.write_bytes(graph.read_bytes() + b" ")
    assert "changed after it was published" in rival.against(place, 1, candidate, silent)["unknown"]
    graph.unlink()
    found = rival.against(place, 1, candidate, silent)
    assert found["unknown"] == "version 1 is no ONNX file"
    assert found["told"] == ["it is not compared: version 1 is no ONNX file"] and found["better"] == []
    assert rival.find(place, "another") is None
