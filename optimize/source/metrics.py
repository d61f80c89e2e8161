"""Metrics: scores by name, one figure for each sample, taken from a model's first output and the targets.

A figure that is no mean of samples, such as F1, is made from one number for each sample by its `aggregate`, so that two
models are still compared sample by sample.
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
        higher_is_better: whether more of it is better.
        bounded: whether the figure lies in [0, 1].
        aggregate: makes the figure from what `judge` returned.
    """

    judge: Callable[[Array, Array], Array]
    higher_is_better: bool = True
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
    return _by_sample(said == right, right != IGNORED)


def iou(outputs: Array, targets: Array, *, above: float = 0.0) -> Array:
    """Return each sample's intersection over union, the mean over the labels that stand in it; arguments as `accuracy`.

    Of labels that are there or not, only those that are there count.
    """
    said, right = _decided(outputs, targets, above)
    binary = _classes(outputs, targets) == 2 and outputs.size == right.size
    found = []
    for one, other in zip(said.reshape(len(said), -1), right.reshape(len(right), -1), strict=True):
        one, other = one[other != IGNORED], other[other != IGNORED]
        labels = [1] if binary else np.union1d(one, other)
        shares = [_over(one == label, other == label) for label in labels]
        found.append(np.mean(shares) if len(shares) else 1.0)
    return np.array(found)


def f1(outputs: Array, targets: Array, *, above: float = 0.0) -> Array:
    """Return a number for each sample of which `f1_of` makes the F1; arguments as `accuracy`, one label a sample.

    The label's own number, and behind the point .9 where it is said, else half of what was said over what may be said:
    right is more than wrong.
    """
    said, right = _decided(outputs, targets, above)
    if right.ndim != 1:
        raise _unlike("f1", outputs, targets, "one label for each sample")
    classes = _classes(outputs, targets)
    return right + np.where(said == right, 0.9, said / classes / 2)


def f1_of(samples: Array, *, classes: int) -> float:
    """Return the F1 of the label 1 of two, or the mean of those of all labels (macro), from what `f1` returned."""
    right = np.floor(samples).astype(int)
    behind = samples - right
    said = np.where(behind > 0.8, right, np.rint(behind * 2 * classes).astype(int))
    labels = [1] if classes == 2 else np.union1d(right, said)
    found = []
    for label in labels:
        hits, all_of_it = np.sum((said == label) & (right == label)), np.sum(said == label) + np.sum(right == label)
        found.append(2 * hits / all_of_it if all_of_it else 0.0)
    return float(np.mean(found))


def auroc(outputs: Array, targets: Array) -> Array:
    """Return for each sample the share of those of the other label that the output tells it from, ties half.

    Their mean over all samples is the area under the ROC curve (DeLong and others, Biometrics 44, 1988).

    Args:
        outputs: one number a sample, more of it for the label 1, or [n, 2] for the labels 0 and 1.
        targets: labels 0 and 1, [n].
    """
    if outputs.size == 2 * targets.size:
        outputs = outputs.reshape(-1, 2)[:, 1] - outputs.reshape(-1, 2)[:, 0]
    said, right = outputs.reshape(-1).astype(np.float64), targets.reshape(-1)
    if len(said) != len(right) or not set(np.unique(right).tolist()) <= {0, 1}:
        raise _unlike("auroc", outputs, targets, "one number for each sample, and labels 0 and 1")
    found = np.empty(len(said))
    for label, sign in ((1, 1.0), (0, -1.0)):
        own, others = sign * said[right == label], np.sort(sign * said[right != label])
        if not len(others):
            raise BadWorkload(f"auroc: all targets are {label}", fix="evaluate on samples of both labels")
        below, upto = np.searchsorted(others, own, "left"), np.searchsorted(others, own, "right")
        found[right == label] = (below + upto) / 2 / len(others)
    return found


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
    logs, judged = log_softmax(np.moveaxis(outputs.astype(np.float64), axis, -1), -1), targets != IGNORED
    told = np.take_along_axis(logs, np.where(judged, targets, 0)[..., None].astype(np.int64), -1)[..., 0]
    return _by_sample(-told, judged)


def named(name: str, outputs: Array, targets: Array) -> Metric:
    """Return the metric of that name for outputs and targets such as these, the trained model's.

    Labels that are there or not are told from each other at .5 where all outputs lie in [0, 1], else at 0: those are
    probabilities, others are logits.

    Raises:
        BadWorkload: there is no such metric.
    """
    above = 0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0.0
    classes = _classes(outputs, targets)
    known = {
        "accuracy": Metric(partial(accuracy, above=above)),
        "f1": Metric(partial(f1, above=above), aggregate=partial(f1_of, classes=classes)),
        "iou": Metric(partial(iou, above=above)),
        "auroc": Metric(auroc),
        "mse": Metric(squared, higher_is_better=False, bounded=False),
        "rmse": Metric(squared, False, False, lambda samples: float(np.sqrt(np.mean(samples)))),
        "mae": Metric(absolute, higher_is_better=False, bounded=False),
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


def _classes(outputs: Array, targets: Array) -> int:
    """Return how many labels there are to choose from, 2 where one is there or not."""
    many = outputs.ndim > 1 and (outputs.size != targets.size or _one_hot(outputs, targets))
    return int(outputs.shape[1]) if many else 2


def _class_axis(outputs: Array, targets: Array, what: str) -> int:
    if outputs.ndim == targets.ndim + 1:
        for axis in (1, outputs.ndim - 1):
            if (*outputs.shape[:axis], *outputs.shape[axis + 1 :]) == targets.shape:
                return axis
    raise _unlike(what, outputs, targets, "logits with one more axis than the labels")


def _by_sample(values: Array, judged: Array) -> Array:
    """Return the mean over the places of each sample that are judged, 0 where none is."""
    sums = np.where(judged, values, 0).reshape(len(values), -1).sum(1)
    found: Array = sums / np.maximum(judged.reshape(len(values), -1).sum(1), 1)
    return found


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
