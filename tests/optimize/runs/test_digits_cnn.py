"""The digits example: real data, held out, and weights that reach what docs/figures.md says."""

import numpy as np

from optimize.judge import evaluate
from optimize.predict.module import TorchPredictor
from optimize.source.load import load_workload
from optimize.source.workload import Workload


def images(workload: Workload, kind: str) -> set[bytes]:
    return {image.tobytes() for batch in workload.batches(kind) for image in batch.inputs["image"]}


def test_the_committed_weights_reach_98_percent_on_held_out_digits() -> None:
    digits = load_workload("examples/digits_cnn.py:workload")
    quality = evaluate.evaluate(TorchPredictor(digits.build(), digits.outputs), digits)
    assert quality.scores[0].value >= 0.98
    assert len(quality.scores[0].samples) == 540


def test_calibration_and_evaluation_share_no_image() -> None:
    digits = load_workload("examples/digits_cnn.py:workload")
    assert not images(digits, "evaluation") & images(digits, "calibration")
    batch = next(digits.batches("training"))
    assert batch.inputs["image"].shape == (64, 1, 28, 28)
    assert np.isin(batch.targets, np.arange(10)).all()
