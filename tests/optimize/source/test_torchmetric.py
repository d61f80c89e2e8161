"""Metrics of torchmetrics, as numbers for each sample."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassCohenKappa,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from optimize import Workload
from optimize.judge.evaluate import evaluate
from optimize.model.errors import BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.source import torchmetric

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
LOGITS = (RNG.normal(size=(60, 3)) + 2 * np.eye(3)[LABELS]).astype(np.float32)
NUMBERS = RNG.normal(size=60).astype(np.float32)
NEAR = (NUMBERS + RNG.normal(size=60) / 4).astype(np.float32)
METRICS: dict[str, tuple[Any, np.ndarray, np.ndarray, bool]] = {
    "a sum": (MulticlassF1Score(3, average="macro"), LOGITS, LABELS, True),
    "a sum of squares": (MeanSquaredError(), NEAR, NUMBERS, False),
    "several sums": (R2Score(), NEAR, NUMBERS, True),
    "a matrix": (MulticlassCohenKappa(3), LOGITS, LABELS, True),
    "lists": (MulticlassCalibrationError(3), LOGITS, LABELS, False),
    "running means": (PearsonCorrCoef(), NEAR, NUMBERS, True),
    "logits that look like probabilities one by one": (BinaryF1Score(), NUMBERS, LABELS % 2, True),
    "all samples in order": (MulticlassAUROC(3), LOGITS, LABELS, True),
}


@pytest.mark.parametrize("keeps", METRICS)
def test_the_mean_of_the_samples_is_the_figure(keeps: str) -> None:
    metric, outputs, targets, better = METRICS[keeps]
    name, read = torchmetric.read(metric)
    samples = read.judge(outputs, targets)
    assert name == name.lower() and samples.shape == (60,) and samples.dtype == np.float64
    assert read.higher_is_better in (better, None)
    metric.reset()
    metric.update(torch.from_numpy(outputs), torch.from_numpy(targets))
    assert read.aggregate(samples) == pytest.approx(float(metric.compute()), abs=1e-5)


def test_of_a_mean_they_are_its_own_numbers() -> None:
    _, read = torchmetric.read(MeanSquaredError())
    assert read.judge(NEAR, NUMBERS) == pytest.approx((NEAR - NUMBERS) ** 2, abs=1e-4)


def test_the_users_own_metric_is_not_changed() -> None:
    metric = MeanSquaredError()
    metric.update(torch.zeros(3), torch.ones(3))
    torchmetric.read(metric)[1].judge(NEAR, NUMBERS)
    assert float(metric.compute()) == 1


def test_a_metric_without_a_single_figure_is_refused() -> None:
    with pytest.raises(BadWorkload, match="MulticlassConfusionMatrix computes no single figure"):
        torchmetric.read(MulticlassConfusionMatrix(3))[1].judge(LOGITS, LABELS)


def test_what_would_take_hours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchmetric, "MOST", 50)
    with pytest.raises(BadWorkload, match="cannot be told sample by sample of 60"):
        torchmetric.read(BinaryF1Score())[1].judge(NUMBERS, LABELS % 2)


def test_a_workload_is_judged_by_one() -> None:
    made = Workload.of(nn.Linear(3, 3), [(LOGITS, LABELS)], MulticlassF1Score(3, average="macro"))
    assert made.higher_is_better == {"multiclass_f1_score": True}
    assert "metric multiclass_f1_score: more is better" in made.inferred
    module = made.build()
    outputs = TorchPredictor(module, made.outputs)
    found = evaluate(outputs, made, None, 32).scores[0]
    said = outputs.predict({made.inputs[0].name: LOGITS})["output"]
    metric = MulticlassF1Score(3, average="macro")
    assert found.value == pytest.approx(float(metric(torch.from_numpy(said), torch.from_numpy(LABELS))), abs=1e-6)
    assert found.low < found.value < found.high


def test_a_metric_that_does_not_say_which_way_is_better_is_asked_about() -> None:
    with pytest.raises(BadWorkload, match="does not say whether more or less"):
        made = Workload.of(nn.Linear(3, 1), [(LOGITS, NUMBERS[:, None])], PearsonCorrCoef())
        evaluate(TorchPredictor(made.build(), made.outputs), made, None, 32)


def test_a_collection_is_not_one_metric() -> None:
    with pytest.raises(BadWorkload, match="MetricCollection is several metrics"):
        Workload.of(nn.Linear(3, 3), [(LOGITS, LABELS)], MetricCollection([MulticlassF1Score(3)]))
