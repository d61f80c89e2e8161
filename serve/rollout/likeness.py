"""Likeness: how like the answers of two versions of a model are, row by row.

A row is what one sample gets of an output. NaN is like nothing, not even NaN: an answer that cannot be judged is none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelathe.tensors import Array, Arrays

SHORT = 3
"""Rows of so few values are compared by their relative error: the direction of one value is only a sign."""
UNIT = 1e-3
"""Rows whose length is one but for this are directions, such as embeddings, and name no label."""


@dataclass(frozen=True)
class Rows:
    """The rows of many answers.

    Args:
        likeness: 1 for equal rows, less for others; the least of all outputs, -1 where it cannot be told. Shape [rows].
        flipped: whether the largest value of a row stands in another place: another label. Shape [rows].
        difference: the largest absolute difference of a float output; infinite where only one has a value.
    """

    likeness: NDArray[np.float64]
    flipped: NDArray[np.bool_]
    difference: float


def compare(answers: Sequence[tuple[Arrays, Arrays]], batched: bool) -> Rows:
    """Compare pairs of answers to the same request.

    Args:
        answers: the outputs by name, of the old version and of the new one.
        batched: whether the first dim is the batch; else an output is one row.
    """
    typical, labels = _scales(answers, batched)
    likeness, flipped, difference = [], [], 0.0
    for old, new in answers:
        count = max((len(_rows(array, batched)) for array in old.values()), default=0)
        alike, other = np.full(count, np.inf), np.zeros(count, dtype=bool)
        for name, array in old.items():
            alike = np.minimum(alike, _likeness(array, new.get(name), batched, typical[name]))
            if labels[name]:
                other |= _flipped(array, new.get(name), batched)
            difference = max(difference, _difference(array, new.get(name)))
        likeness.append(alike)
        flipped.append(other)
    joined = np.concatenate(likeness) if likeness else np.empty(0)
    return Rows(joined, np.concatenate(flipped) if flipped else np.empty(0, dtype=bool), difference)


def _rows(array: Array, batched: bool) -> Array:
    """Return the array as [rows, values]."""
    count = len(array) if batched and array.ndim else 1
    return array.reshape(count, math.prod(array.shape[1:]) if batched else array.size)


def _scales(answers: Sequence[tuple[Arrays, Arrays]], batched: bool) -> tuple[dict[str, float], dict[str, bool]]:
    """Return for each output the usual length of a row of the old version, and whether its rows name labels."""
    typical, labels = {}, {}
    for name in {name for old, _ in answers for name in old}:
        arrays = [old[name] for old, _ in answers if name in old]
        if arrays[0].dtype.kind != "f":
            typical[name], labels[name] = 0.0, False
            continue
        lengths = np.concatenate([np.linalg.norm(_rows(array, batched).astype(np.float64), axis=1) for array in arrays])
        finite = lengths[np.isfinite(lengths)]
        typical[name] = float(np.median(finite)) if len(finite) else 0.0
        flat = arrays[0].ndim == 1 + batched and arrays[0].shape[-1] > 1
        labels[name] = flat and not (len(finite) > 0 and bool((np.abs(finite - 1) < UNIT).all()))
    return typical, labels


def _matches(old: Array, new: Array | None) -> bool:
    return new is not None and new.shape == old.shape and new.dtype == old.dtype


def _likeness(old: Array, new: Array | None, batched: bool, typical: float) -> NDArray[np.float64]:
    """Return how like each row is.

    Long rows of floats are compared by 2 <a, b> / (|a|² + |b|²), the cosine where both have the same length; short ones
    by 1 - |a - b| / the longest of |a|, |b| and the typical length; rows of others are equal (1) or not (0).
    """
    one = _rows(old, batched)
    if new is None or not _matches(old, new):
        return np.zeros(len(one))
    two = _rows(new, batched)
    same = np.asarray((one == two).all(1), dtype=bool)
    if old.dtype.kind != "f":
        return same.astype(np.float64)
    one, two = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if one.shape[1] <= SHORT:
            alike = 1 - np.linalg.norm(one - two, axis=1) / np.maximum(np.maximum(*lengths), typical)
        else:
            alike = 2 * (one * two).sum(1) / (lengths[0] ** 2 + lengths[1] ** 2)
    return np.where(same, 1.0, np.nan_to_num(np.maximum(alike, -1.0), nan=-1.0))


def _flipped(old: Array, new: Array | None, batched: bool) -> Any:
    if new is None or not _matches(old, new):
        return np.ones(len(_rows(old, batched)), dtype=bool)
    return _rows(old, batched).argmax(1) != _rows(new, batched).argmax(1)


def _difference(old: Array, new: Array | None) -> float:
    if old.dtype.kind != "f":
        return 0.0
    if new is None or new.shape != old.shape:
        return float("inf")
    if not old.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(old.astype(np.float64) - new)
    # Infinity beside the same infinity is the same answer; beside anything else, and NaN always, it is none.
    return float(np.where(old == new, 0.0, np.nan_to_num(apart, nan=np.inf, posinf=np.inf)).max())
