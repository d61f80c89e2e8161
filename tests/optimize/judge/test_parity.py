"""Each output is judged by its own scale: what moves one of them excuses no other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loadtest.plan.data import answers
from modelathe.tensors import BATCH, TensorSpec
from optimize.judge import gate, mates, parity
from optimize.methods.export.onnx import export

ROW = TensorSpec("x", "float32", (BATCH, 4), (0, 1))


class Detector(nn.Module):
    """Boxes in pixels that lean on their batch mates, scores that do not, and labels that seldom do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mates = x.amax() - x.amax(1, keepdim=True)
        return 640 * x + 10 * mates, x.softmax(1), (x + 0.02 * mates).argmax(1)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    path: Path = export(
        Detector().eval(), [ROW], ["boxes", "scores", "labels"], tmp_path_factory.mktemp("d") / "model.onnx"
    )
    return mates.deviation(path, [{"x": ROW.generate(np.random.default_rng(0), 64)}], 8)


def test_how_far_each_output_moves_is_known(moved: dict[str, float]) -> None:
    assert 1 < moved["boxes"] < 10
    assert moved["scores"] < 1e-5
    assert moved["labels"] == 0.0  # what is added to all values of a row changes no largest one


def answer(**changed: Any) -> dict[str, Any]:
    whole = {
        "boxes": np.full((50, 4), 100, np.float32),
        "scores": np.full((50, 2), 0.5, np.float32),
        "labels": np.arange(50),
    }
    return {**whole, **changed}


def test_boxes_excuse_no_scores(moved: dict[str, float]) -> None:
    wrong = answer(scores=answer()["scores"] + np.float32(0.3))
    old = parity.lane("all outputs alike", [(wrong, answer())], answers.tolerance(max(moved.values())))
    assert old["mismatched"] == 0, "one tolerance for all passes scores that are 0.3 off"
    found = parity.lane("batched", [(wrong, answer())], answers.tolerance(moved))
    assert (found["mismatched"], found["output"]) == (50, "scores")
    assert not gate.parity(found).passed
    near = answer(boxes=answer()["boxes"] + np.float32(1))
    assert gate.parity(parity.lane("batched", [(near, answer())], answers.tolerance(moved))).passed


@pytest.mark.parametrize(
    ("share", "changed", "passes"),
    [(0.0, 0, True), (0.0, 1, False), (0.04, 3, True), (0.04, 30, False), (1.0, 50, True)],
)
def test_labels_may_change_as_often_as_the_file_itself_changes_them(share: float, changed: int, passes: bool) -> None:
    labels = np.arange(50)
    labels[:changed] += 5
    moved = {"boxes": 0.0, "scores": 0.0, "labels": share}
    found = parity.lane("batched", [(answer(labels=labels), answer())], answers.tolerance(moved))
    assert gate.parity(found).passed == passes
    assert found["mismatched"] == (0 if passes else changed)


def test_another_form_is_no_label_that_may_change() -> None:
    labels = np.arange(2)
    pairs = [({"label": labels}, {"label": labels})] * 40 + [({"label": np.arange(3)}, {"label": labels})]
    found = parity.lane("batched", pairs, answers.tolerance({"label": 0.2}))
    assert found["mismatched"] == 2
    assert not gate.parity(found).passed


def test_a_tolerance_for_all_lets_no_label_change() -> None:
    labels = np.arange(50)
    labels[7] += 1
    found = parity.lane("same batches", [(answer(labels=labels), answer())], 7.5)
    assert (found["mismatched"], found["output"]) == (1, "labels")


def test_answers_of_several_forms_are_judged_one_by_one() -> None:
    pairs = [({"y": np.zeros((1, size), np.float32)}, {"y": np.zeros((1, size), np.float32)}) for size in (2, 5)]
    assert parity.lane("batched", pairs, 1e-5)["requests"] == 2
    pairs.append(({"y": np.zeros((1, 3), np.float32)}, {"y": np.zeros((1, 2), np.float32)}))
    found = parity.lane("batched", pairs, 1e-5)
    assert (found["requests"], found["mismatched"]) == (3, 1)
    assert not gate.parity(found).passed


def test_nothing_compared_is_no_parity() -> None:
    assert not gate.parity(parity.lane("batched", [], 1e-5)).passed


def test_under_load_too_each_output_has_its_own_tolerance() -> None:
    right = {"boxes": np.array([[100.0]], np.float32), "scores": np.array([[0.5]], np.float32)}
    judge = answers.Answers({0: (right, {"boxes": 3.0, "scores": 0.001})})
    assert judge.wrong(0, 0, b"1", lambda: {**right, "boxes": right["boxes"] + 2}) == ""
    assert judge.wrong(1, 0, b"2", lambda: {**right, "scores": right["scores"] + 0.3}).startswith("output scores")


@pytest.mark.parametrize(("share", "every", "wrong"), [(0.05, 20, 0), (0.05, 4, 20), (0.05, 1, 190), (0.0, 20, 10)])
def test_under_load_too_labels_may_change_as_often_as_the_file_changes_them(
    share: float, every: int, wrong: int
) -> None:
    judge = answers.Answers({0: ({"label": np.array([3])}, answers.tolerance({"label": share}))})
    labels = [np.array([4 if n % every == every - 1 else 3]) for n in range(200)]
    said = [judge.wrong(n, 0, got.tobytes(), lambda got=got: {"label": got}) for n, got in enumerate(labels)]
    assert (sum(map(bool, said)) >= wrong) if wrong else not any(said)
    assert judge.wrong(200, 0, b"form", lambda: {"label": np.array([3, 3])}).startswith("output label is int64[2]")
