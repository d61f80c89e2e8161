"""Sensitivity: one layer at a time, on one page."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.judge import effect as sensitivity
from optimize.methods.export.onnx import export
from optimize.methods.prune.channels import Channels
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.table import METHODS
from optimize.model.errors import BadBundle
from optimize.report import figures
from optimize.report import sensitivity as report
from optimize.runs import study as studies
from optimize.runs.study import groups
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from serve.config.target import Target
from tests.browser import assert_fits, needs_browser

ROW = TensorSpec("input", "float32", (BATCH, 256))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(256, 512), nn.ReLU())
        self.head = nn.Linear(512, 4)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input))


@pytest.fixture(scope="module")
def pair() -> Workload:
    def batches() -> list[Batch]:
        return [Batch({"input": np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)})]

    def scores(outputs: Any, targets: Any, reference: Any) -> dict[str, Any]:
        return {"minus distance": -np.abs(outputs["y"] - reference["y"]).mean(1)}

    return Workload("pair", Pair(), (ROW,), ("y",), batches, scores, higher_is_better={"minus distance": True})


@pytest.fixture
def study(pair: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(studies, "SECONDS", 0.0)  # no verdict waits for more than nine rounds

    def run(*configs: object, depth: int = 0, lineage: tuple[dict[str, Any], ...] = ()) -> Any:
        context = Context(pair, pair.build(), Target(cores=1, batch=(4,)), 0, tmp_path, lambda text, _: None)
        return studies.study(configs, Bundle(pair, pair.build(), lineage=lineage), context, depth)

    return run


def test_each_layer_is_pruned_and_quantized_alone(study: Callable[..., Any]) -> None:
    effects, skipped = study(Dynamic(), Channels(ratio=0.5))
    assert [(effect.method, effect.name) for effect in effects] == [
        ("quantize.dynamic", "encoder.0/Gemm"),
        ("quantize.dynamic", "head/Gemm"),
        ("prune.channels", "encoder.0"),
    ]
    first, head, pruned = effects
    # INT8 saves three of four bytes; pruning, half of the neurons with what reads them. Both within the graph's text.
    assert first.bytes_saved == pytest.approx(3 * 256 * 512, rel=0.05)
    assert head.bytes_saved == pytest.approx(3 * 4 * 512, rel=0.35)
    assert pruned.bytes_saved == pytest.approx(4 * 256 * (256 + 1 + 4), rel=0.02)
    assert 0 < first.loss < pruned.loss
    assert 0 < first.error < 0.05 < pruned.error
    for effect in effects:
        assert effect.metric == "minus distance"
        assert effect.low <= effect.loss <= effect.high
        low, high = effect.interval["4"]
        assert 0 < low <= effect.speedup["4"] <= high
    assert [(entry["method"], entry["name"]) for entry in skipped] == [("prune.channels", "head")]
    assert "found no layer that it may prune" in skipped[0]["why"]


def test_a_loss_that_rises_is_a_loss(pair: Workload, tmp_path: Path) -> None:
    def distance(outputs: Any, targets: Any, reference: Any) -> dict[str, Any]:
        return {"distance": np.abs(outputs["y"] - reference["y"]).mean(1)}

    rising = replace(pair, scores=distance, higher_is_better={"distance": False})
    path = export(pair.build(), pair.inputs, pair.outputs, tmp_path / "model.onnx")
    effects = []
    for workload in (pair, rising):
        context = Context(workload, pair.build(), Target(cores=1), 0, tmp_path, lambda text, _: None)
        folder = tmp_path / workload.name / str(len(effects))
        folder.mkdir(parents=True)
        treated = sensitivity.treat(METHODS[Dynamic], Dynamic(), path, folder, context)
        against = sensitivity.untreated(path, context)
        effects.append(sensitivity.effect("all", "quantize.dynamic", treated, against, context))
    negated, direct = effects
    assert 0 < direct.low < direct.loss < direct.high
    assert (direct.loss, direct.low, direct.high) == pytest.approx((negated.loss, negated.low, negated.high))


def test_a_group_is_treated_together(study: Callable[..., Any]) -> None:
    effects, _ = study(Dynamic(), depth=1)
    assert [effect.name for effect in effects] == ["encoder", "head"]


def test_layers_are_grouped_by_the_path_of_their_module() -> None:
    names = ["encoder.layer.0.dense/MatMul", "encoder.layer.1.dense/MatMul", "head/Gemm", "MatMul"]
    assert list(groups(names, 0)) == names
    assert groups(names, 1) == {"encoder": names[:2], "head": names[2:3], "MatMul": names[3:]}
    assert list(groups(names, 3)) == ["encoder.layer.0", "encoder.layer.1", "head", "MatMul"]


def test_a_quantized_bundle_is_refused(study: Callable[..., Any]) -> None:
    with pytest.raises(BadBundle, match=r"its last step is quantize\.static"):
        study(Dynamic(), lineage=({"name": "quantize.static"},))


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_the_command_prints_a_table_and_writes_page_and_document(
    optimize: Any, user_file: Callable[..., str], tmp_path: Path
) -> None:
    page = tmp_path / "new" / "page.html"
    ended = optimize(
        *("sensitivity", user_file(), "--output", page, "--method", "quantize.static", "--samples", 65),
        *("--batch", "2", "--json"),
    )
    assert ended.code == 0
    found = json.loads(ended.out)
    assert [layer["name"] for layer in found["layers"]] == ["hidden/Gemm", "wide/Gemm", "out/Gemm"]
    assert (found["samples"], found["judged_on"]) == (65, "training")
    wide = found["layers"][1]
    assert wide["bytes_saved"] == pytest.approx(3 * 768 * 768, rel=0.02)
    assert wide["metric"] == "accuracy"
    assert list(wide["speedup"]) == ["2"]
    assert [entry["name"] for entry in found["skipped"]] == ["conv/Conv"]
    text = page.read_text()
    assert "wide/Gemm" in text and "no weight is left to quantize" in text
    assert "://" not in text, "nothing is fetched"
    assert found["steps"] == [{"use": "quantize.static"}]
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "quantize.statik"), "there is no method 'quantize.statik'"),
        (("--method", "distill.logits"), "cannot leave layers alone"),
        (("--method", "prune.channels", "--ratio", "1.5"), "ratio = 1.5 cannot be"),
        (("--batch", "0"), "cannot be"),
    ],
)
def test_a_wrong_option_is_said_before_the_work(
    options: tuple[str, ...], message: str, optimize: Any, user_file: Callable[..., str], tmp_path: Path
) -> None:
    ended = optimize("sensitivity", user_file(), "--output", tmp_path / "page.html", *options)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_is_no_page(optimize: Any, user_file: Callable[..., str], tmp_path: Path) -> None:
    ended = optimize("sensitivity", user_file(), "--output", tmp_path)
    assert (ended.code, "no page can be written there" in ended.err) == (2, True)


def test_a_stopped_study_leaves_nothing(
    optimize: Any, user_file: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sensitivity, "untreated", stop)
    page = tmp_path / "pages" / "page.html"
    assert optimize("sensitivity", user_file(), "--output", page, "--method", "quantize.dynamic").code == 130
    assert list(page.parent.iterdir()) == []


@pytest.mark.parametrize(("control", "told"), [((0.99, 1.01), True), ((1.2, 1.3), False), ((0.2, 2.0), False)])
def test_a_speed_is_in_colour_only_where_the_control_makes_sense(control: tuple[float, float], told: bool) -> None:
    effect = sensitivity.Effect(
        "head", "quantize.dynamic", "score", 0.1, -0.1, 0.2, 0.0, 9, {"4": 2.0}, {"4": (1.8, 2.2)}, {"4": control}
    )
    speed = figures.sensitivity([effect.document()], ["4"])[-1]
    assert (speed.rows[0].tone == "good") is told
    assert speed.rows[0].tone in ("good", "open")


def effect(name: str, loss: float, low: float, speed: float = 1.0) -> dict[str, Any]:
    speeds = {"4": speed}, {"4": (speed - 0.05, speed + 0.05)}, {"4": (0.99, 1.01)}
    high = 2 * loss - low
    made = sensitivity.Effect(name, "quantize.static", "accuracy", loss, low, high, 0.0, 9, *speeds, (f"{name}[[]0]",))
    return made.document()


def test_layers_are_ranked_and_what_is_shown_to_lose_is_left_out_by_the_recipe() -> None:
    """Names of numbers stay names: `0` and `10` of a Sequential are no places on an axis."""
    layers = [effect("0", 0.01, -0.01), effect("10", 0.05, 0.03), effect("2", -0.02, -0.03)]
    found = report.ranked({"layers": layers}, "quantize.static")
    assert [layer["name"] for layer in found] == ["10", "0", "2"]
    loss = figures.sensitivity(found, ["4"])[0]
    assert [(row.name, row.tone) for row in loss.rows] == [("10", "bad"), ("0", "open"), ("2", "good")]
    lines = report.recipe({"use": "quantize.static", "method": "minmax", "exclude": ["a"]}, found)
    parsed = tomllib.loads(lines)["step"]
    assert parsed == [{"use": "quantize.static", "method": "minmax", "exclude": ["a", "10[[]0]"]}]
    assert report.recipe({"use": "quantize.static"}, [effect("0", 0.01, -0.01)]) == ""


@needs_browser
@pytest.mark.slow
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    layers = [effect("encoder.layer.11.attention.self.query/MatMul", 0.05, 0.03, 1.4), effect("0", -0.0, -0.01, 0.8)]
    layers.append(effect("dense2/Gemm", 0.0, -0.01, 0.8))
    document = {"format": 1, "modelathe": "0", "workload": "w", "samples": 9, "judged_on": "training", "overlap": {}}
    document |= {"batch": [4], "layers": layers, "steps": [{"use": "quantize.static"}]}
    document["skipped"] = [{"method": "quantize.static", "name": "conv1/Conv", "why": "no weight is left to quantize"}]
    page = report.write(document, tmp_path / "page.html")
    assert page.stat().st_size < 100_000
    assert "−0.0000" not in page.read_text() and "Recipe lines" in page.read_text()
    assert_fits(page, tmp_path)
    every = report.write({**document, "layers": layers[:1]}, tmp_path / "every.html").read_text()
    assert "Every layer is shown to lose" in every and "Recipe lines" not in every
