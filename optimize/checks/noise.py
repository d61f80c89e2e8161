"""Noise: whether so many samples can tell a loss that is allowed from one that is not."""

from collections.abc import Iterator

import numpy as np

from optimize.checks.finding import Finding, ok, warning
from optimize.checks.subject import Subject
from optimize.judge import gate, intervals
from optimize.judge.evaluate import Score, compare, evaluate
from optimize.predict.module import TorchPredictor
from optimize.source.batch import Batch, mean

ENOUGH = 512
"""Samples from which the trained model's scores are known well enough for the width of an interval."""
CHANGED = 0.01
"""Share of the samples that a small change of the model is supposed to change, half of them for the better."""


def metric(subject: Subject) -> Iterator[Finding]:
    """Say how wide the interval of a loss is at the number of evaluation samples, beside the loss that is allowed.

    At least it is as wide as for a result that differs in no sample; that of right and wrong is told for one that
    differs in a hundredth too.
    """
    if subject.budget is None:
        return
    workload, samples = subject.workload, subject.samples
    if not subject.whole:
        batches = _some(subject)
        workload, samples = subject.part(*batches), sum(batch.size for batch in batches)
    score = evaluate(TorchPredictor(subject.module, workload.outputs), workload).scores[0]
    allowed = gate.allowed(subject.budget, score)
    judged = len(score.samples) * subject.samples / samples
    difference = compare(workload, score, score)
    width = difference.loss_at(judged)[1]
    said = f"±{width:.4f} if no sample changes"
    if _is_share(score, subject):
        said += f", ±{_changed(judged):.4f} if {CHANGED:.0%} of them do"
    what = f"{score.metric} {score.value:.4f}: {judged:,.0f} samples tell a loss to {said}; {allowed:.4f} is allowed"
    if width <= allowed:
        yield ok("noise", what)
        return
    decide = gate.deciding(difference, int(judged), allowed)
    least = f"{decide:,} at least decide" if decide else "no number of them decides"
    yield warning("noise", f"{what}; {least}", "evaluate on more samples, or allow more in [budget]")


def _some(subject: Subject) -> list[Batch]:
    batches: list[Batch] = []
    for batch in subject.workload.batches("evaluation"):
        batches.append(batch)
        if sum(each.size for each in batches) >= ENOUGH:
            break
    return batches


def _is_share(score: Score, subject: Subject) -> bool:
    """Say whether the figure is the share of samples that are right."""
    return set(np.unique(score.samples).tolist()) <= {0.0, 1.0} and subject.workload.aggregate in (mean, np.mean)


def _changed(samples: float) -> float:
    each = CHANGED / 2 * samples
    low, high = intervals.paired_proportions(each, each, samples)
    return (high - low) / 2
