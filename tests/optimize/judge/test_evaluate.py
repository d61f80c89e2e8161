from dataclasses import replace

import numpy as np
import pytest

from modelathe.tensors import Arrays
from optimize.judge import evaluate
from optimize.judge.evaluate import Score
from optimize.model.errors import BadModel, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.source.workload import Workload


def score(samples: list[float]) -> Score:
    values = np.array(samples, float)
    return Score("accuracy", values, float(values.mean()), 0, 1, True, True)


def test_the_metric_is_the_users_own(small: Workload) -> None:
    quality = evaluate.evaluate(TorchPredictor(small.build(), small.outputs), small)
    accuracy, agreement = quality.scores
    labels = np.concatenate([batch.targets for batch in small.batches("evaluation")])
    assert accuracy.value == (quality.outputs["logits"].argmax(1) == labels).mean()
    assert agreement.value == 1
    assert accuracy.low < accuracy.value < accuracy.high
    assert quality.document()["quality"]["samples"] == len(labels)


def test_cut_batches_answer_the_same(small: Workload) -> None:
    predictor = TorchPredictor(small.build(), small.outputs)
    whole, _ = evaluate.collect(predictor, small)
    pieces, _ = evaluate.collect(predictor, small, largest=10)
    np.testing.assert_allclose(whole["logits"], pieces["logits"], atol=1e-5)


def test_pairs_see_what_means_hide(small: Workload) -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(500) < 0.9).astype(float)
    second = first.copy()
    second[:5] = 1 - second[:5]
    difference = evaluate.compare(small, score(list(second)), score(list(first)))
    assert difference.flipped == (0, 1, 2, 3, 4)
    assert difference.high - difference.low < 0.025, "three times that, were they not pairs"
    assert difference.low <= difference.value <= difference.high


class Answers:
    name = "answers"

    def __init__(self, outputs: Arrays) -> None:
        self.outputs = outputs

    def predict(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return dict(self.outputs)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *exception: object) -> None: ...


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ({"other": np.zeros((64, 10))}, "no output 'logits'"),
        ({"logits": np.zeros((3, 10))}, "has the shape"),
        ({"logits": np.full((64, 10), np.nan)}, "NaN"),
    ],
)
def test_wrong_outputs_are_refused(small: Workload, outputs: Arrays, said: str) -> None:
    with pytest.raises(BadModel, match=said):
        evaluate.collect(Answers(outputs), small)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (lambda o, t, r: 1 / 0, "ZeroDivisionError"),
        (lambda o, t, r: {}, "must return a mapping"),
        (lambda o, t, r: 0.9, "must return a mapping"),
        (lambda o, t, r: {"accuracy": np.float64(0.9)}, "the shape"),
        (lambda o, t, r: {"accuracy": np.full(4, np.nan)}, "NaN"),
    ],
)
def test_wrong_scores_are_refused(small: Workload, scores, said: str) -> None:  # type: ignore[no-untyped-def]
    broken = replace(small, scores=scores)
    with pytest.raises(BadWorkload, match=said):
        evaluate.evaluate(TorchPredictor(small.build(), small.outputs), broken)
