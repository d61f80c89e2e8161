from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Arrays, Dim, TensorSpec
from optimize.judge.evaluate import evaluate
from optimize.judge.gate import Gate
from optimize.methods.export.onnx import export
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.specs import output_specs
from optimize.runs import endpoint, recipe
from optimize.runs.baseline import Trained, cost
from optimize.runs.run import Run, Terms
from optimize.source.batch import Batch
from optimize.source.splits import Sets
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle
from serve.config import model_config
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import staging, tree

TOKENS = Dim("tokens", 1, 8, 32)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(50, 8), nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tags = self.tags(self.words(ids))
        return tags, tags.mean(1)


def test_an_output_keeps_the_dims_that_change_size(small: Workload, tmp_path: Path) -> None:
    inputs = (TensorSpec("ids", "int64", (BATCH, TOKENS), values=(0, 49)),)
    tagger = replace(small, name="tagger", model=Tagger, inputs=inputs, outputs=("tags", "topic"))
    graph = export(Tagger().eval(), inputs, tagger.outputs, tmp_path / "model.onnx")
    answers = {"tags": np.zeros((2, 8, 5), np.float32), "topic": np.zeros((2, 5), np.float32)}
    specs = output_specs(tagger, graph, answers)
    assert [spec.dims for spec in specs] == [(BATCH, TOKENS, 5), (BATCH, 5)]
    config = model_config.build("tagger", inputs, specs, Target(), [1])
    assert [list(output.dims) for output in config.output] == [[-1, 5], [5]]


class Served(OnnxPredictor):
    """Stands in for the endpoint: the same file, without a server."""

    def __init__(self, graph: Path) -> None:
        super().__init__(graph)
        self.name = "endpoint"


@pytest.fixture(scope="module")
def made(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    graph = export(small.build(), small.inputs, small.outputs, tmp_path_factory.mktemp("made") / "model.onnx")
    return Bundle(small, small.build(), graph, ({"name": "export.onnx", "deviation": {"logits": 0.0}},))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("spoiled", [False, True])
def test_the_endpoint_is_judged_strictly_and_nan_is_no_answer(
    strict: bool, spoiled: bool, made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.graph is not None
    graph = made.graph

    def ask(_endpoint: object, _staged: object, samples: list[Arrays]) -> list[dict[str, Any]]:
        with OnnxPredictor(graph) as onnx:
            answers = [dict(onnx.predict(sample)) for sample in samples]
        if spoiled:
            answers[3]["logits"] = np.full_like(answers[3]["logits"], np.nan)
        return answers

    monkeypatch.setattr(endpoint, "EndpointPredictor", lambda _url: Served(graph))
    monkeypatch.setattr(endpoint, "_ask", ask)
    with TorchPredictor(made.module, made.workload.outputs) as torch_side:
        trained = Trained(made, evaluate(torch_side, made.workload), cost(made))
    budget = recipe.parse({"budget": {"max_drop": 0.005}, "step": [{"use": "export.onnx"}]})
    server: Any = type("Endpoint", (), {"grpc": "grpc://127.0.0.1:1"})
    staged: Any = None  # the stand-in for asking needs none
    this = Run(budget, trained, Sets({}, {}), tmp_path, Terms(strict=strict))
    _, parity, gates = endpoint._compare(this, server, made, staged)
    same, batched, quality = gates
    assert same.passed
    assert batched.passed is not spoiled
    assert parity["mismatched"] == int(spoiled)
    # 397 samples without a flip leave room for a drop of 0.01.
    assert quality.passed is not strict
    assert "the interval holds the limit: about 796 samples decide" in quality.advice
    assert isinstance(quality, Gate) and quality.name == "quality: accuracy at the endpoint"


class Price(nn.Module):
    """One number and one label for each sample, from a row and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(8, 3)

    def forward(self, row: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.row(row) * count[:, None]
        return found.sum(1), found.argmax(1)


def price() -> nn.Module:
    torch.manual_seed(0)
    return Price()


def priced(seed: int) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        row, count = rng.random((16, 8), dtype=np.float32), rng.integers(1, 5, 16)
        yield Batch({"row": row, "count": count}, None)


def same(outputs: Arrays, targets: Any, reference: Arrays) -> dict[str, Any]:
    assert outputs["price"].shape == reference["price"].shape
    return {"agreement": (outputs["label"] == reference["label"]) & np.isclose(outputs["price"], reference["price"])}


@pytest.mark.usefixtures("each_step_faster")
@pytest.mark.parametrize("settings", [{}, {"max_batch": 0}])
def test_a_number_for_each_sample_is_served_proven_and_published(
    settings: dict[str, int], tmp_path: Path, server_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = (TensorSpec("row", "float32", (BATCH, 8)), TensorSpec("count", "int64", (BATCH,), (1, 4)))
    load = Workload(
        *("price", price, inputs, ("price", "label")),
        evaluation=lambda: priced(1),
        calibration=lambda: priced(2),
        scores=same,
        bounded=True,
    )
    graph = export(load.build(), load.inputs, load.outputs, tmp_path / "model.onnx")
    made = Bundle(load, load.build(), graph, ({"name": "export.onnx", "deviation": {"price": 1e-6, "label": 0.0}},))
    asked = {"budget": {"keep": 0.99}, "step": [{"use": "export.onnx"}], "load": {"duration": 0.3}, "serve": settings}
    with TorchPredictor(made.module, load.outputs) as torch_side:
        quality = evaluate(torch_side, load)
    trained = Trained(made, quality, cost(made))
    this = Run(recipe.parse(asked), trained, Sets({}, {}), tmp_path, Terms(force=True))
    place = tmp_path / "repository"
    usual = Settings(threads=1)
    release = endpoint.Release(made, quality, place, {"told": "so"}, lambda proof: f"<p>{proof.version}</p>", usual)
    stage, served_as = staging.stage, []
    monkeypatch.setattr(staging, "stage", lambda *all: served_as.append(all[-1]) or stage(*all))
    proof = endpoint.prove(this, release, [])
    # The trained model is served as its own times say, not as the result is.
    assert served_as == [this.recipe.serve, usual]
    # How fast the client was is not the matter here.
    judged = [entry.document() for entry in proof.gates if not entry.name.startswith("load")]
    assert len(judged) == 3
    assert all(entry["passed"] for entry in judged), judged
    assert proof.endpoint["parity"]["mismatched"] == 0
    assert proof.load["checked"] == proof.load["requests"]["done"] > 0
    assert proof.load["requests"]["mismatched"] == 0
    assert proof.version and proof.version["state"] == "live"
    again = endpoint.prove(this, release, [])
    assert again.version and (again.version["number"], again.version["state"]) == (2, "staged")
    assert again.comparison and again.comparison["quality"]["difference"] == 0
    assert tree.live(place, "price") == [1]
    lineage = tree.read_lineage(place, "price", 2)
    assert (lineage["told"], lineage["comparison"]["number"]) == ("so", 1)
    assert again.version["digest"] in (place / "price" / "2" / tree.PAGE).read_text()
    tree.verify_version(place, "price", 2, lineage)
