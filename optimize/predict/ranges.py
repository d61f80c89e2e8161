"""Ranges: the largest magnitudes that float values inside a graph reach on given batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path

import numpy as np

from modelathe.tensors import Array, Arrays
from optimize.predict import inner

Mask = Callable[[Arrays], Array | None]
"""Returns for the inputs of a batch which positions are tokens, bool [n, length], or None."""


def nowhere(_inputs: Arrays) -> None:
    """Return what says that there is no padding."""
    return


def largest(path: Path, names: Sequence[str], batches: Iterable[Arrays], mask: Mask = nowhere) -> dict[str, float]:
    """Return the largest magnitude that each of the values `names` reaches.

    Args:
        path: an ONNX file; left as it is.
        names: float32 values: results of nodes, or inputs of the graph.
        batches: inputs by name.
        mask: of values [n, length, …] only the tokens count.
    """
    found = dict.fromkeys(names, 0.0)
    for values in _tokens(path, names, batches, mask):
        for name, value in values.items():
            found[name] = max(found[name], float(np.abs(value).max(initial=0.0)))
    return found


def by_channel(path: Path, names: Sequence[str], batches: Iterable[Arrays], mask: Mask = nowhere) -> dict[str, Array]:
    """Return the same for each position on the last axis of the values: float32 [channels] by name."""
    found: dict[str, Array] = {}
    for values in _tokens(path, names, batches, mask):
        for name, value in values.items():
            seen = np.abs(value).reshape(-1, value.shape[-1] if value.ndim else 1).max(axis=0, initial=0.0)
            found[name] = np.maximum(found.get(name, seen), seen)
    return found


def _tokens(path: Path, names: Sequence[str], batches: Iterable[Arrays], mask: Mask) -> Iterator[dict[str, Array]]:
    given, fed = tee(batches)
    for batch, values in zip(given, inner.values(path, names, fed), strict=True):
        where = mask(batch)
        if where is None or where.all():
            yield values
        else:
            yield {name: value[where] if _is_by_token(value, where) else value for name, value in values.items()}


def _is_by_token(value: Array, where: Array) -> bool:
    return value.ndim > 2 and value.shape[:2] == where.shape
