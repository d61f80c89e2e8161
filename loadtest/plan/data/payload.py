"""Payload: what the requests carry when nobody gave data: random values in the ranges of the model's TensorSpecs.

Never one constant tensor unless asked for, because caches and compressors along the way would make the server look
faster than it is. What a user gives is read in `loadtest.plan.data`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtest.plan.data.answers import Tolerance
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import UNBOUNDED, Arrays, Dim, TensorSpec, generated


def generate(specs: Sequence[TensorSpec], count: int, seed: int, batch: int = 1) -> list[Arrays]:
    """Return `count` different requests of random values in the specs' ranges.

    Args:
        specs: the model's inputs.
        count: how many requests; the run cycles through them.
        seed: equal seeds give equal values.
        batch: samples per request, for a model with a batch axis.

    Raises:
        UsageError: a size is unknown, or the model takes no batch of this size.
    """
    check_batch(specs, batch)
    for spec in specs:
        _check_known(spec)
    return [generated(specs, batch, (seed, n)) for n in range(count)]


def with_shapes(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> list[TensorSpec]:
    """Return the specs with the dims of the named ones replaced; the batch axis stays and is not part of a shape.

    Raises:
        UsageError: a name or a rank that the model does not have.
    """
    if unknown := set(shapes) - {spec.name for spec in specs}:
        raise UsageError(
            f"--shape names {', '.join(sorted(unknown))}, which is no input of the model",
            fix=f"its inputs are {', '.join(spec.name for spec in specs)}",
        )
    return [_with_shape(spec, shapes[spec.name]) if spec.name in shapes else spec for spec in specs]


def _with_shape(spec: TensorSpec, shape: tuple[int, ...]) -> TensorSpec:
    if not spec.takes(shape):
        raise UsageError(
            f"--shape {spec.name}:{','.join(map(str, shape))} does not fit {describe(spec)}",
            fix="give one size per dim, without the batch axis",
        )
    return replace(spec, dims=(*spec.dims[: len(spec.dims) - len(shape)], *shape))


def describe(spec: TensorSpec) -> str:
    """Return a spec as a person reads it, as in `x: float32 [batch<=32, 64]`."""

    def text(dim: int | Dim) -> str:
        if isinstance(dim, int):
            return str(dim)
        return dim.name if dim.maximum == UNBOUNDED else f"{dim.name}<={dim.maximum}"

    return f"{spec.name}: {spec.dtype} [{', '.join(map(text, spec.dims))}]"


def check_batch(specs: Sequence[TensorSpec], batch: int) -> None:
    """Raise a `UsageError` if the model takes no batch of this size."""
    if batch < 1:
        raise UsageError(f"a batch of {batch}", fix="use 1 or more")
    for spec in specs:
        if batch > spec.largest_batch:
            raise UsageError(
                f"a batch of {batch} is more than the model takes: {describe(spec)}",
                fix=f"use at most {spec.largest_batch}",
            )


def _check_known(spec: TensorSpec) -> None:
    if any(isinstance(dim, Dim) and dim.maximum == UNBOUNDED for dim in spec.own):
        sizes = ",".join(str(dim) if isinstance(dim, int) else "N" for dim in spec.own)
        raise UsageError(
            f"the size of a dim is not known: {describe(spec)}",
            fix=f"give it as --shape {spec.name}:{sizes} with numbers for N, or use --data or --repository",
        )


def _deviation(stated: Any) -> Tolerance | None:
    if stated is None:
        return None
    found = {output: float(moved) for output, moved in stated.items()} if isinstance(stated, dict) else float(stated)
    for moved in found.values() if isinstance(found, dict) else [found]:
        if not 0 <= moved < math.inf:
            raise ValueError(f"the deviation {moved}")
    return found


def from_lineage(repository: Path, model: str, version: str) -> tuple[list[TensorSpec], Tolerance | None]:
    """Return what `REPOSITORY/MODEL/VERSION/lineage.json` states.

    Returns:
        The inputs as requests carry them, with typical sizes and value ranges; and how much an output was seen to move
        with the batch that its sample is in, None where that was not measured.

    Raises:
        BadInput: the file is missing or cannot be read.
    """
    path = repository / model / version / "lineage.json"
    try:
        lineage = json.loads(path.read_text())
        deviation = _deviation(lineage.get("deviation"))
        specs = [TensorSpec.from_document(document).served for document in lineage["inputs"]]
        return specs, deviation
    except FileNotFoundError:
        raise BadInput(
            "there is no such file", where=str(path), fix="leave --repository away to use the server's own metadata"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"is not a lineage that can be read: {error!r}", where=str(path)) from error
