"""Batching: whether the server may put requests together, because a sample is answered in a batch as it is alone.

The first dim of a tensor that changes size may be time, or a model may look at all of its batch. No file says so, and
each answer would be wrong without a word.
"""

from collections.abc import Callable, Sequence

import numpy as np

from modelathe.tensors import Array, Arrays, TensorSpec, generated

SAMPLES = 3
CLOSE, COARSE = 0.01, 0.25
"""How far a value may be off, as a share of the output's largest: as floats round, and as integers do whose ranges are
taken from the whole batch."""


def mixed(ask: Callable[[Arrays], Arrays], inputs: Sequence[TensorSpec], largest: int, coarse: bool) -> str:
    """Return the output whose value for a sample depends on the batch that the sample is in; empty where none does.

    Asked are a batch of different samples, one of equal ones, whose ranges are those of the sample, and each sample
    alone. A model that answers the same request differently each time says nothing.

    Args:
        ask: answers a request.
        inputs: the specs of the model's inputs, as requests carry them.
        largest: the most samples of a request.
        coarse: whether the model computes in integers.
    """
    count = min(SAMPLES, largest)
    batch = generated(inputs, count)
    samples = [{name: array[n : n + 1] for name, array in batch.items()} for n in range(count)]
    alone = [ask(sample) for sample in samples]
    allowed = COARSE if coarse else CLOSE
    if count < 2 or _apart(ask(samples[0]), alone[:1], allowed):
        return ""
    equal = {name: np.repeat(array, count, 0) for name, array in samples[0].items()}
    # With coarse rounding other samples may change which of two labels is the larger, but equal ones may not.
    return _apart(ask(equal), alone[:1] * count, allowed) or _apart(ask(batch), alone, allowed, labels=not coarse)


def _apart(answer: Arrays, alone: Sequence[Arrays], allowed: float, *, labels: bool = True) -> str:
    """Return the first output of a batch whose rows are not those of the samples alone; empty if there is none.

    Args:
        answer: to the batch.
        alone: to its samples.
        allowed: how far a float may be off, as a share of the largest.
        labels: whether what is no float is compared.
    """
    compared = {name: array for name, array in answer.items() if labels or array.dtype.kind == "f"}
    rows = {name: [one[name] for one in alone] for name in compared}
    return next((name for name, array in compared.items() if not _same(array, rows[name], allowed)), "")


def _same(array: Array, rows: Sequence[Array], allowed: float) -> bool:
    if len(array) != len(rows) or any(row.shape != (1, *array.shape[1:]) for row in rows):
        return False
    wanted = np.concatenate(rows)
    if array.dtype.kind != "f":
        return np.array_equal(array, wanted)
    finite = np.abs(wanted[np.isfinite(wanted)].astype(np.float64))
    return np.allclose(array, wanted, rtol=0, atol=allowed * finite.max(initial=0.0), equal_nan=True)
