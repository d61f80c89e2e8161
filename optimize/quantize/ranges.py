"""Ranges: the largest magnitudes that float values inside a graph reach on given batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from loadtest.tensors import Array, Arrays
from optimize.export import inner


def largest(path: Path, names: Sequence[str], batches: Iterable[Arrays]) -> dict[str, float]:
    """Return the largest magnitude that each of the values `names` reaches.

    Args:
        path: an ONNX file; left as it is.
        names: float32 values: results of nodes, or inputs of the graph.
        batches: inputs by name.
    """
    return {name: float(seen.max(initial=0.0)) for name, seen in by_channel(path, names, batches).items()}


def by_channel(path: Path, names: Sequence[str], batches: Iterable[Arrays]) -> dict[str, Array]:
    """Return the same for each position on the last axis of the values: float32 [channels] by name."""
    found: dict[str, Array] = {}
    for values in inner.values(path, names, batches):
        for name, value in values.items():
            seen = np.abs(value).reshape(-1, value.shape[-1] if value.ndim else 1).max(axis=0, initial=0.0)
            found[name] = np.maximum(found.get(name, seen), seen)
    return found
