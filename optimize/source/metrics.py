"""Metrics: scores by name, one figure for each sample, taken from a model's first output and the targets.

A figure that is no mean of samples, such as F1 or perplexity, is made from one number for each sample by its
`aggregate`, so that two models are still compared sample by sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from modelathe.tensors import Array
from optimize.model.errors import BadWorkload
from optimize.source.batch import mean

IGNORED = -100
"""The label of a position that is not judged, as torch's losses have it."""


@dataclass(frozen=True)
class Metric:
    """What a score's name stands for.

    Args:
        judge: `judge(outputs, targets)` on arrays with one row a sample; returns float64 [samples].
        higher_is_better: whether more of it is better; None if it does not say.
        bounded: whether the figure lies in [0, 1].
        aggregate: makes the figure from what `judge` returned.
    """

    judge: Callable[[Array, Array], Array]
    higher_is_better: bool | None = True
    bounded: bool = True
    aggregate: Callable[[Array], float] = mean


def accuracy(outputs: Array, targets: Array, *, above: float = 0.0) -> Array:
    """Return the share of each sample's labels that are right.

    Args:
        outputs: [n, classes, …] or [n, …, classes] for one label of several at each place, or as the targets for labels
            that are there or not.
        targets: labels [n, …], `IGNORED` where none is judged.
        above: a label that is there or not is said to be there above this output.
    """
    said, right = _decided(outputs, targets, above)
    return _by_sample(said == right, _judged(right))


def iou(outputs: Array, targets: Array, *, above: float = 0.0) -> Array:
    """Return each sample's intersection over union, the mean over the labels that stand in it; arguments as `accuracy`.

    Of labels that are there or not, only those that are there count.
    """
    said, right = _decided(outputs, targets, above)
    binary = outputs.size == right.size
    found = []
    rows = (each.reshape(len(said), -1) for each in (said, right, _judged(right)))
    for one, other, judged in zip(*rows, strict=True):
        one, other = one[judged], other[judged]
        labels = [1] if binary else np.union1d(one, other)
        shares = [_over(one == label, other == label) for label in labels]
        found.append(np.mean(shares))
    return np.array(found)


def f1(outputs: Array, targets: Array, *, above: float = 0.0) -> Array:
    """Return 1 for each sample whose label 1 is found, 0 for each one wrong, .5 where it is rightly not said.

    Of two labels a sample, in the form of `accuracy`; of these numbers `f1_of` makes the F1. They lie in [0, 1], and
    right is more than wrong, as `optimize.judge.intervals` needs it: an interval allows for samples that were not seen,
    the best and the worst.
    """
    said, right = _decided(outputs, targets, above)
    if right.ndim != 1 or not set(np.unique(right).tolist()) <= {0, 1} or said.max() > 1:
        raise _unlike("f1", outputs, targets, "one label of two for each sample")
    return np.where(said != right, 0.0, np.where(right == 1, 1.0, 0.5))


def f1_of(samples: Array) -> float:
    """Return the F1 of the label 1 from what `f1` returned; 0 where the label is neither there nor said."""
    found, wrong = np.sum(samples == 1), np.sum(samples == 0)
    return float(2 * found / (2 * found + wrong)) if found else 0.0


def macro_f1(outputs: Array, targets: Array) -> Array:
    """Return a number for each sample, of which the mean is the mean F1 of all labels that are right or said somewhere.

    Arguments as `accuracy`, one label a sample; the numbers are those of `samples_of`.
    """
    said, right = _decided(outputs, targets, 0.0)
    if right.ndim != 1:
        raise _unlike("f1", outputs, targets, "one label for each sample")
    _judged(right)
    pairs, place, counts = np.unique(np.stack([right, said]), axis=1, return_inverse=True, return_counts=True)
    size = int(pairs.max()) + 1

    def figure(less: int | None) -> float:
        seen = counts - (np.arange(len(counts)) == less)
        found = np.bincount(pairs[0], seen * (pairs[0] == pairs[1]), size)
        named = np.bincount(pairs[0], seen, size) + np.bincount(pairs[1], seen, size)
        return float(np.mean(2 * found[named > 0] / named[named > 0]))

    return samples_of(figure(None), np.array([figure(less) for less in range(len(counts))])[place.reshape(-1)])


def samples_of(figure: float, without: Array) -> Array:
    """Return a number for each sample, of which the mean is a figure that is made of all samples at once.

    They are the jackknife's: how far the figure moves when the sample is left out, times the samples, moved so that
    their mean is the figure itself (Tukey, "Bias and Confidence in Not-Quite Large Samples", 1958; Efron and Stein,
    Annals of Statistics 9, 1981).

    Args:
        figure: that of all samples.
        without: float64 [n], that of all but one.
    """
    found: Array = figure + (len(without) - 1) * (without.mean() - without)
    return found


def auroc(outputs: Array, targets: Array) -> Array:
    """Return how much each sample's output speaks for its own label, of which `auroc_of` makes the area.

    Above .5 for the label 1 and below it for the label 0, the more the better: the output's place in (0, 1), halved.

    Args:
        outputs: one number a sample, more of it for the label 1, or [n, 2] for the labels 0 and 1.
        targets: labels 0 and 1, [n].
    """
    if outputs.size == 2 * targets.size:
        outputs = outputs.reshape(-1, 2)[:, 1] - outputs.reshape(-1, 2)[:, 0]
    said, right = outputs.reshape(-1).astype(np.float64), targets.reshape(-1)
    if len(said) != len(right) or len(said) != len(targets) or not set(np.unique(right).tolist()) <= {0, 1}:
        raise _unlike("auroc", outputs, targets, "one number for each sample, and labels 0 and 1")
    if len(np.unique(right)) == 1:
        raise BadWorkload(f"auroc: all targets are {right[0]:g}", fix="evaluate on samples of both labels")
    place = (1 + said / (1 + np.abs(said))) / 2
    found: Array = np.where(right == 1, 1 + place, 1 - place) / 2
    return found


def auroc_of(samples: Array) -> float:
    """Return the area under the ROC curve from what `auroc` returned; .5 where one label has no sample.

    It is the share of pairs of the two labels that the outputs tell apart, ties half (Hanley and McNeil, Radiology 143,
    1982).
    """
    there, others = 2 * samples[samples > 0.5] - 1, np.sort(1 - 2 * samples[samples <= 0.5])
    if not len(there) or not len(others):
        return 0.5
    below, upto = np.searchsorted(others, there, "left"), np.searchsorted(others, there, "right")
    return float(np.mean(below + upto) / 2 / len(others))


def squared(outputs: Array, targets: Array) -> Array:
    """Return each sample's mean squared error; both arrays hold as many numbers."""
    return _errors(outputs, targets, "mse") ** 2 @ _share(outputs)


def absolute(outputs: Array, targets: Array) -> Array:
    """Return each sample's mean absolute error; both arrays hold as many numbers."""
    return np.abs(_errors(outputs, targets, "mae")) @ _share(outputs)


def surprise(outputs: Array, targets: Array) -> Array:
    """Return each sample's mean negative log-likelihood of its labels; `outputs` are logits, as in `accuracy`."""
    from scipy.special import log_softmax

    axis = _class_axis(outputs, targets, "perplexity")
    logs, judged = log_softmax(np.moveaxis(outputs.astype(np.float64), axis, -1), -1), _judged(targets)
    told = np.take_along_axis(logs, np.where(judged, targets, 0)[..., None].astype(np.int64), -1)[..., 0]
    return _by_sample(-told, judged)


def word_errors(outputs: Array, targets: Array) -> Array:
    """Return a number for each sample, of which the mean is the word error rate: all edits over all right words.

    What is left out, put in or said for another is an edit (Levenshtein, 1966); the numbers are those of `samples_of`.

    Args:
        outputs: scores [n, steps, labels] of a model that was trained by CTC, read greedily: the best label of each
            step, repeats as one, without the blank, label 0 (Graves et al., ICML 2006); or the labels said, [n, words].
        targets: the right labels, [n, words]; `IGNORED`, here and in labels said, where a sequence is shorter.
    """
    if outputs.ndim not in (2, 3) or targets.ndim != 2 or len(outputs) != len(targets):
        raise _unlike("word_error_rate", outputs, targets, "scores [n, steps, labels] and labels [n, words]")
    for labels in (targets, outputs) if outputs.ndim == 2 else (targets,):
        if labels.dtype.kind not in "iu":
            raise BadWorkload(
                f"word_error_rate: labels are integers, not {labels.dtype}",
                fix="give scores [n, steps, labels] or labels as integers, and the right labels as integers",
            )
    said = (
        [row[row != IGNORED] for row in outputs] if outputs.ndim == 2 else [_greedy(row) for row in outputs.argmax(2)]
    )
    right = [row[row != IGNORED] for row in targets]
    edits = np.array([_edits(one, other) for one, other in zip(said, right, strict=True)], np.float64)
    words = np.array([len(row) for row in right])
    figure, others = edits.sum() / max(words.sum(), 1), words.sum() - words
    if not others.all():
        raise BadWorkload("word_error_rate: fewer than two samples hold right words", fix="evaluate on more samples")
    return samples_of(figure, (edits.sum() - edits) / others)


def _greedy(steps: Array) -> Array:
    first = np.append(True, steps[1:] != steps[:-1])
    found: Array = steps[first & (steps != 0)]
    return found


def _edits(said: Array, right: Array) -> int:
    """Return the least edits that make one sequence of the other."""
    least = np.arange(len(right) + 1)
    for label in said:
        changed = np.append(least[0] + 1, np.minimum(least[1:] + 1, least[:-1] + (right != label)))
        # What is left out of `right` costs one each, from the cheapest place before.
        least = np.minimum.accumulate(changed - np.arange(len(changed))) + np.arange(len(changed))
    return int(least[-1])


def threshold(outputs: Array) -> float:
    """Return above which output a label that is there or not is said to be there: they are probabilities, or logits."""
    return 0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0.0


def named(name: str, outputs: Array, targets: Array) -> Metric:
    """Return the metric of that name for outputs and targets such as these, the trained model's.

    Labels that are there or not are told from each other at the `threshold` of these outputs.

    Raises:
        BadWorkload: there is no such metric.
    """
    above = threshold(outputs)
    two = outputs.shape[1:] == (2,) or (outputs.size == targets.size and not _one_hot(outputs, targets))
    known = {
        "accuracy": Metric(partial(accuracy, above=above)),
        "f1": Metric(partial(f1, above=above), aggregate=f1_of) if two else Metric(macro_f1),
        "iou": Metric(partial(iou, above=above)),
        "auroc": Metric(auroc, aggregate=auroc_of),
        "mse": Metric(squared, higher_is_better=False, bounded=False),
        "rmse": Metric(squared, False, False, lambda samples: float(np.sqrt(np.mean(samples)))),
        "mae": Metric(absolute, higher_is_better=False, bounded=False),
        "word_error_rate": Metric(word_errors, higher_is_better=False, bounded=False),
        "perplexity": Metric(surprise, False, False, lambda samples: float(np.exp(np.mean(samples)))),
    }
    if name not in known:
        raise BadWorkload(
            f"there is no metric {name!r}",
            fix=f"use one of {', '.join(known)}, or a function of outputs and targets with one number a sample",
        )
    return known[name]


def _decided(outputs: Array, targets: Array, above: float) -> tuple[Array, Array]:
    """Return the labels that the outputs say and those that are right, of one shape."""
    if targets.dtype.kind == "f" and not np.isfinite(targets).all():
        raise BadWorkload("some targets are NaN or infinite", fix=f"leave those samples out, or say {IGNORED} for them")
    if _one_hot(outputs, targets):
        return outputs.argmax(1), targets.argmax(1)
    if outputs.size == targets.size:
        said = (outputs.reshape(targets.shape) > above).astype(np.int64)
        return said, np.where(targets == IGNORED, IGNORED, targets > 0.5).astype(np.int64)
    return outputs.argmax(_class_axis(outputs, targets, "labels")), targets.astype(np.int64)


def _one_hot(outputs: Array, targets: Array) -> bool:
    """Say whether the targets name one of several classes by a 1 among zeros, in every sample."""
    alike = targets.ndim == 2 and targets.shape == outputs.shape and targets.shape[1] > 1
    return alike and set(np.unique(targets).tolist()) <= {0, 1} and bool((targets.sum(1) == 1).all())


def _class_axis(outputs: Array, targets: Array, what: str) -> int:
    if outputs.ndim == targets.ndim + 1:
        axes = {1, outputs.ndim - 1}
        fitting = [axis for axis in axes if (*outputs.shape[:axis], *outputs.shape[axis + 1 :]) == targets.shape]
        if len(fitting) == 1:
            return fitting[0]
    raise _unlike(what, outputs, targets, "logits with one more axis than the labels, of another size than theirs")


def _by_sample(values: Array, judged: Array) -> Array:
    """Return the mean over the places of each sample that are judged."""
    sums = np.where(judged, values, 0).reshape(len(values), -1).sum(1)
    found: Array = sums / judged.reshape(len(values), -1).sum(1)
    return found


def _judged(targets: Array) -> Array:
    """Return which labels are judged; each sample must have one."""
    judged: Array = targets != IGNORED
    if bare := int(np.sum(~judged.reshape(len(judged), -1).any(1))):
        raise BadWorkload(
            f"{bare} of {len(judged)} samples have no label that is judged: all are {IGNORED}",
            fix="leave those samples out",
        )
    return judged


def _errors(outputs: Array, targets: Array, what: str) -> Array:
    if outputs.size != targets.size or len(outputs) != len(targets):
        raise _unlike(what, outputs, targets, "as many numbers as the outputs")
    flat: Array = (outputs.astype(np.float64).reshape(targets.shape) - targets).reshape(len(outputs), -1)
    return flat


def _share(outputs: Array) -> Array:
    width = outputs.size // len(outputs)
    return np.full(width, 1 / width)


def _over(one: Array, other: Array) -> float:
    union = np.sum(one | other)
    return float(np.sum(one & other) / union) if union else 1.0


def _unlike(what: str, outputs: Array, targets: Array, wanted: str) -> BadWorkload:
    return BadWorkload(
        f"{what}: outputs {outputs.shape} and targets {targets.shape} do not go together",
        fix=f"give {wanted}, or a function of outputs and targets in its place",
    )
