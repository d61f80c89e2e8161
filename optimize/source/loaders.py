"""Loaders: batches as a user's loaders give them, made into those of a workload.

A loader is a torch DataLoader, a list, or a function that returns one; or a tuple of whole arrays, inputs first. Each
of its items holds inputs and targets: `(x, y)`, `(x1, x2, y)`, `({"x": x}, y)`, a mapping such as a BatchEncoding, or
inputs alone.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from modelathe.tensors import Array
from optimize.model.errors import BadData, BadWorkload
from optimize.source.batch import Batch, Batches, guarded

TARGETS = ("label", "labels", "target", "targets")
"""Arguments that forward can do without and that hold what is right, as `labels` of a Hugging Face model: no inputs."""
TOGETHER = 32
"""Samples in a batch that is cut from whole arrays."""


@dataclass(frozen=True)
class Arguments:
    """What a module's forward takes: the names in their order, and how many of them it cannot do without."""

    names: tuple[str, ...]
    required: int


def arguments(module: nn.Module) -> Arguments:
    """Return the arguments of a module's forward.

    Raises:
        BadWorkload: it takes any number, so that they have no names.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [each for each in inspect.signature(module.forward).parameters.values() if each.kind in kinds]
    if not found:
        raise BadWorkload(
            f"the arguments of {type(module).__name__}.forward have no names",
            fix="wrap it in a module whose forward names them",
        )
    required = sum(each.default is inspect.Parameter.empty for each in found)
    found = [each for each in found if each.default is inspect.Parameter.empty or each.name not in TARGETS]
    return Arguments(tuple(each.name for each in found), required)


def batches(loader: Any, what: str, taken: Arguments, source: str) -> Batches:
    """Return a function that yields the batches of a loader, anew at every call.

    Args:
        loader: as above.
        what: the data's kind, for what is said of them.
        taken: by forward.
        source: of the workload, for what is said of the user's code.

    Raises:
        BadData: it can be read but once.
    """
    if isinstance(loader, Iterator):
        raise BadData(
            f"{what} can be read only once",
            fix="give a DataLoader, a list of batches, or a function that returns batches at every call",
        )

    def read() -> Iterator[Batch]:
        items = _cut(loader) if isinstance(loader, tuple) else loader() if callable(loader) else loader
        for item in guarded(lambda: iter(items), what, source):
            yield batch(item, taken, what)

    return read


def batch(item: Any, taken: Arguments, what: str) -> Batch:
    """Return one item of a loader as a Batch.

    Raises:
        BadData: its inputs cannot be told from its targets.
    """
    if isinstance(item, Batch):
        return item
    inputs, targets = _parted(item, taken)
    if not taken.required <= len(inputs) or set(inputs) - set(taken.names):
        given = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"{len(item)} parts"
        raise BadData(
            f"{what} has batches of {given}, forward takes {', '.join(taken.names)}",
            fix="let a batch be inputs in forward's order and then the targets, or a mapping by forward's names",
        )
    return Batch({name: array(value) for name, value in inputs.items()}, _arrays(targets))


def _parted(item: Any, taken: Arguments) -> tuple[Mapping[str, Any], Any]:
    """Return the inputs by name, and the targets, None where there are none."""
    names = taken.names
    if isinstance(item, Mapping):
        rest = {name: value for name, value in item.items() if name not in names}
        inputs = {name: value for name, value in item.items() if name in names}
        return inputs, next(iter(rest.values())) if len(rest) == 1 else rest or None
    if not isinstance(item, tuple | list):
        return {names[0]: item}, None
    *first, last = item
    if len(first) == 1 and isinstance(first[0], Mapping):
        return first[0], last
    if len(first) == 1 and isinstance(first[0], tuple | list):
        first = [*first[0]]
    elif len(first) < taken.required:  # inputs alone
        first, last = [*first, last], None
    numbered = [*names, *(f"input {number}" for number in range(len(names), len(first)))]
    return dict(zip(numbered, first, strict=False)), last


def array(value: Any) -> Array:
    """Return a tensor, or what is like an array, as numpy's."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _arrays(targets: Any) -> Any:
    if isinstance(targets, Mapping):
        return {name: array(value) for name, value in targets.items()}
    return None if targets is None else array(targets)


def _cut(whole: tuple[Any, ...]) -> Iterable[Any]:
    """Yield slices of whole arrays."""
    arrays = [array(part) for part in whole]
    if len({len(part) for part in arrays}) != 1:
        raise BadData(f"arrays of {', '.join(str(len(part)) for part in arrays)} samples", fix="give as many of each")
    for start in range(0, len(arrays[0]), TOGETHER):
        yield tuple(part[start : start + TOGETHER] for part in arrays)
