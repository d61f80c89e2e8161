"""Mates: how much a graph's answer to a sample depends on the others in its batch."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelathe.tensors import Array, Arrays
from optimize.model.errors import BadGraph
from optimize.source.batch import concatenate
from serve.config.target import Target

COMPOSITIONS = 20
"""How many random batches are drawn."""


def deviation(
    path: Path,
    batches: Sequence[Arrays],
    largest: int,
    seed: int = 0,
    target: Target | None = None,
    few: int = 1,
) -> dict[str, float]:
    """Return how much each output of a sample depends on its batch mates.

    A graph that takes a range over the whole batch, as dynamic INT8 does, answers a sample differently in another
    company. No tighter tolerance than this can hold for a server that batches requests.

    Args:
        path: the ONNX file.
        batches: real inputs; all batches together give the samples.
        largest: the most samples of one batch, as a server may form it; at least 2 are drawn where it may.
        seed: seeds the draw.
        target: says which runtime answers; ONNX Runtime by default.
        few: the fewest samples of one batch; where these are several, a sample alone has the first others beside it.

    Returns:
        By output: the largest absolute difference between a sample's values in a drawn batch and its values alone. Of
        one that is no floating-point number, a label say, the share of the samples that had another in the batch.

    Raises:
        BadGraph: an output is NaN or infinite in one batch and not in another.
    """
    from optimize.predict.runtimes import open_graph

    rng = np.random.default_rng(seed)
    samples = [
        {name: array[row : row + 1] for name, array in batch.items()} for batch in batches for row in _rows(batch)
    ]
    seen: dict[str, list[float]] = {}
    floating: dict[str, bool] = {}
    alone: dict[int, dict[str, Array]] = {}
    with open_graph(path, target or Target()) as predictor:
        for _ in range(COMPOSITIONS):
            chosen = _draw(rng, samples, few, largest)
            together = predictor.predict(concatenate([samples[index] for index in chosen], "inputs"))
            for row, index in enumerate(chosen):
                if index not in alone:
                    others = [mate for mate in _mates(samples, index) if mate != index]
                    beside = [samples[mate] for mate in (index, *others[: few - 1])]
                    alone[index] = predictor.predict(concatenate(beside, "inputs"))
                for name, answer in alone[index].items():
                    seen.setdefault(name, []).append(_moved(name, together[name][row], answer[0], path))
                    floating[name] = answer.dtype.kind == "f"
    return {name: max(moved) if floating[name] else float(np.mean(moved)) for name, moved in seen.items()}


def _moved(name: str, together: Array, alone: Array, path: Path) -> float:
    """Return how far an output is from that of the sample alone; of one that is no float, 1 where it is another."""
    if alone.dtype.kind != "f":
        return float(not np.array_equal(together, alone))
    distance = _distance(together, alone)
    if not math.isfinite(distance):
        raise BadGraph(
            f"output {name!r} of a sample is NaN or infinite in one batch and not in another",
            where=path.name,
            fix="look for a division by what the batch mates add up to, or for an overflow",
        )
    return distance


def _draw(rng: np.random.Generator, samples: Sequence[Arrays], few: int, largest: int) -> list[int]:
    """Return one random batch, as indices of samples that can be stacked."""
    mates = _mates(samples, int(rng.integers(len(samples))))
    size = int(rng.integers(max(2, few), max(largest, few) + 1)) if largest > 1 else 1
    return [int(index) for index in rng.choice(mates, min(size, len(mates)), replace=False)]


def _mates(samples: Sequence[Arrays], index: int) -> list[int]:
    """Return the indices of the samples that can be stacked with one, itself included."""
    shapes = {name: array.shape for name, array in samples[index].items()}
    return [i for i, other in enumerate(samples) if {name: array.shape for name, array in other.items()} == shapes]


def _distance(left: Array, right: Array) -> float:
    """Return the largest difference; values that are NaN, or the same infinity, on both sides are alike."""
    one, other = left.astype(np.float64), right.astype(np.float64)
    differs = ~((one == other) | (np.isnan(one) & np.isnan(other)))
    return float(np.abs(one[differs] - other[differs]).max(initial=0.0))


def _rows(batch: Arrays) -> range:
    return range(len(next(iter(batch.values()))))
