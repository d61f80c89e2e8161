"""Padding: which positions of a batch are tokens, and data and tensors without the others.

A padded position is no data: it is in no range, no score and no loss. `Workload.mask` says where the tokens are.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from modelathe.tensors import Array, Arrays, Dim
from optimize.model.errors import BadWorkload
from optimize.source import sample
from optimize.source.batch import Batch, concatenate, guarded
from optimize.source.workload import Workload

if TYPE_CHECKING:
    import torch

TOGETHER = 32
"""Samples of one length that are run together."""


def mask(workload: Workload, inputs: Mapping[str, Any]) -> Array | None:
    """Return which positions of a batch are tokens, bool [n, length]; None where the workload knows no padding.

    Args:
        workload: its `mask` says so, else an input named `attention_mask` of two dims.
        inputs: arrays or tensors by name.

    Raises:
        BadWorkload: the user's function raised, or returned something else.
    """
    arrays = {name: value if isinstance(value, np.ndarray) else value.cpu().numpy() for name, value in inputs.items()}
    if (given := workload.mask) is None:
        found = arrays.get("attention_mask")
        return None if found is None or found.ndim != 2 else found != 0
    made = guarded(lambda: np.asarray(given(arrays)) != 0, "mask()", workload.source)
    if made.ndim != 2 or len(made) != len(next(iter(arrays.values()))):
        raise BadWorkload(
            f"mask() returned the shape {made.shape}",
            where=workload.source or workload.name,
            fix="return [n, length] for n samples: not 0 where a token is, 0 where padding is",
        )
    return made  # type: ignore[no-any-return]


def tokens(workload: Workload, inputs: Mapping[str, "torch.Tensor"]) -> "torch.Tensor | None":
    """Return what `mask` returns as a tensor on the inputs' device."""
    import torch

    found = mask(workload, inputs)
    return None if found is None else torch.from_numpy(found).to(next(iter(inputs.values())).device)


def kept(values: "torch.Tensor", where: "torch.Tensor | None") -> "torch.Tensor":
    """Return [tokens, …], the vectors of the tokens, of values [n, length, …]; other values as they are.

    Of attention maps [n, heads, length, length] the rows of the tokens that look; padding is not looked at anyway.
    """
    axis = None if where is None else _axis(values, where)
    return values if axis is None else values.movedim(axis, 1)[where]


def silenced(values: "torch.Tensor", where: "torch.Tensor | None") -> "torch.Tensor":
    """Return values of the same shape, zero where `kept` leaves them out."""
    axis = None if where is None else _axis(values, where)
    if where is None or axis is None:
        return values
    turned = values.movedim(axis, 1)
    return turned.where(where.reshape(*where.shape, *[1] * (turned.dim() - 2)), 0).movedim(1, axis)


def _axis(values: "torch.Tensor", where: "torch.Tensor") -> int | None:
    """Return the axis of the tokens, None where there is none."""
    samples, length = where.shape
    if values.dim() == 4 and values.shape[2:] == (length, length) and len(values) == samples:
        return 2
    return 1 if values.dim() > 2 and values.shape[:2] == (samples, length) else None


def stripped(workload: Workload, batches: Iterable[Batch]) -> Iterator[dict[str, Array]]:
    """Yield the inputs of the batches without their padding, samples of one length together.

    What is cut is every axis with the free Dim that the tokens lie on, down to the smallest size that it may have. An
    axis of a fixed size stays, and its padding with it.
    """
    waiting: dict[tuple[tuple[int, ...], ...], list[dict[str, Array]]] = {}
    for batch in batches:
        for row in _rows(workload, batch.inputs):
            alike = waiting.setdefault(tuple(array.shape for array in row.values()), [])
            alike.append(row)
            if len(alike) == TOGETHER:
                yield concatenate(alike, "inputs")
                alike.clear()
    yield from (concatenate(alike, "inputs") for alike in waiting.values() if alike)


def calibration(workload: Workload) -> "Iterator[tuple[dict[str, torch.Tensor], torch.Tensor | None]]":
    """Yield the inputs of all calibration samples as tensors, stripped, and which of their positions are tokens.

    Of an endless set it is the first million samples.
    """
    import torch

    for arrays in stripped(workload, sample.reached(workload, "calibration")):
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        yield inputs, tokens(workload, inputs)


def _rows(workload: Workload, inputs: Arrays) -> Iterator[dict[str, Array]]:
    where = mask(workload, inputs)
    axes = [] if where is None else _axes(workload, inputs, where.shape[1])
    for number in range(len(next(iter(inputs.values())))):
        row = {name: array[number : number + 1] for name, array in inputs.items()}
        for name, axis, least in axes:
            assert where is not None
            row[name] = np.take(row[name], _span(where[number], least), axis)
        yield row


def _axes(workload: Workload, inputs: Arrays, length: int) -> list[tuple[str, int, int]]:
    """Return the input, the axis and the smallest size of each axis that the tokens lie on."""
    free = [
        (spec.name, axis, dim)
        for spec in workload.inputs
        for axis, dim in enumerate(spec.dims)
        if axis and isinstance(dim, Dim) and inputs[spec.name].shape[axis] == length
    ]
    # Another Dim may have the same size by chance.
    return [(name, axis, dim.minimum) for name, axis, dim in free if dim.name == free[0][2].name]


def _span(row: Array, least: int) -> Array:
    """Return the positions from the first token to the last, and more of them up to `least`."""
    found = np.flatnonzero(row)
    first, last = (found[0], found[-1] + 1) if len(found) else (0, 0)
    first = max(0, min(first, len(row) - least))
    return np.arange(first, min(len(row), max(last, first + least)))
