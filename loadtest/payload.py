"""Payload: what the requests carry, made or read before the run.

Values come from the model's own TensorSpecs or from an .npz file of the user's; never one constant tensor, because
caches and compressors along the way would make the server look faster than it is.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loadtest.errors import BadInput, UsageError
from loadtest.tensors import UNBOUNDED, Array, Arrays, Dim, TensorSpec


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
    _check_batch(specs, batch)
    for spec in specs:
        _check_known(spec)
    return [
        {spec.name: spec.generate(np.random.default_rng([seed, n, place]), batch) for place, spec in enumerate(specs)}
        for n in range(count)
    ]


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
    axis = spec.dims[:1] if spec.batched else ()
    own = spec.dims[len(axis) :]
    fits = len(own) == len(shape) and all(
        size == dim if isinstance(dim, int) else dim.minimum <= size <= dim.maximum
        for dim, size in zip(own, shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"--shape {spec.name}:{','.join(map(str, shape))} does not fit {describe(spec)}",
            fix="give one size per dim, without the batch axis",
        )
    return replace(spec, dims=(*axis, *shape))


def describe(spec: TensorSpec) -> str:
    """Return a spec as a person reads it, as in `x: float32 [batch<=32, 64]`."""

    def text(dim: int | Dim) -> str:
        if isinstance(dim, int):
            return str(dim)
        return dim.name if dim.maximum == UNBOUNDED else f"{dim.name}<={dim.maximum}"

    return f"{spec.name}: {spec.dtype} [{', '.join(map(text, spec.dims))}]"


def _check_batch(specs: Sequence[TensorSpec], batch: int) -> None:
    if batch < 1:
        raise UsageError(f"a batch of {batch}", fix="use 1 or more")
    for spec in specs:
        limit = spec.dims[0].maximum if spec.batched and isinstance(spec.dims[0], Dim) else 1
        if batch > limit:
            raise UsageError(
                f"a batch of {batch} is more than the model takes: {describe(spec)}", fix=f"use at most {limit}"
            )


def _check_known(spec: TensorSpec) -> None:
    own = spec.dims[1:] if spec.batched else spec.dims
    if any(isinstance(dim, Dim) and dim.maximum == UNBOUNDED for dim in own):
        sizes = ",".join(str(dim) if isinstance(dim, int) else "N" for dim in own)
        raise UsageError(
            f"the size of a dim is not known: {describe(spec)}",
            fix=f"give it as --shape {spec.name}:{sizes} with numbers for N, or use --data or --repository",
        )


def from_lineage(repository: Path, model: str, version: str) -> tuple[list[TensorSpec], float | None]:
    """Return what `REPOSITORY/MODEL/VERSION/lineage.json` states.

    Returns:
        The inputs with typical sizes and value ranges; and how much an output was seen to move with the batch that its
        sample is in, None where that was not measured.

    Raises:
        BadInput: the file is missing or cannot be read.
    """
    path = repository / model / version / "lineage.json"
    try:
        lineage = json.loads(path.read_text())
        deviation = lineage.get("deviation")
        specs = [TensorSpec.from_document(document) for document in lineage["inputs"]]
        return specs, None if deviation is None else float(deviation)
    except FileNotFoundError:
        raise BadInput(
            "there is no such file", where=str(path), fix="leave --repository away to use the server's own metadata"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"is not a lineage that can be read: {error!r}", where=str(path)) from error


def load_npz(path: Path, specs: Sequence[TensorSpec], batch: int = 1) -> list[Arrays]:
    """Return the samples of an .npz file, cut into requests of `batch` samples.

    Args:
        path: a file with one array per input, named like it, the first axis counting samples. Samples that do not fill
            the last batch are left out.
        specs: the model's inputs.
        batch: samples per request; a model without a batch axis gets one sample per request, without that axis.

    Raises:
        BadInput: the file cannot be used; the message names the array and what is wrong with it.
    """
    _check_batch(specs, batch)
    arrays = {spec.name: _checked(path, spec, array) for spec, array in _read(path, specs)}
    lengths = {name: len(array) for name, array in arrays.items()}
    samples = min(lengths.values())
    if len(set(lengths.values())) > 1:
        raise BadInput(f"the arrays have different numbers of samples: {lengths}", where=str(path))
    if samples < batch:
        raise BadInput(f"has {samples} samples, a request takes {batch}", where=str(path), fix="use a smaller --batch")
    starts = range(0, samples - batch + 1, batch)
    batched = {spec.name: spec.batched for spec in specs}
    return [
        {name: array[at : at + batch] if batched[name] else array[at] for name, array in arrays.items()}
        for at in starts
    ]


def _read(path: Path, specs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, Array]]:
    names = [spec.name for spec in specs]
    fix = f"write it with numpy.savez({path.name!r}, {', '.join(f'{name}=...' for name in names)})"
    try:
        # Opened here, because numpy leaves the file open when it turns out to be no archive.
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise BadInput("holds one array without a name", where=str(path), fix=fix)
            if set(file.files) != set(names):
                raise BadInput(
                    f"has the arrays {', '.join(sorted(file.files)) or 'none'}; the model's inputs are "
                    f"{', '.join(names)}",
                    where=str(path),
                    fix=fix,
                )
            return [(spec, file[spec.name]) for spec in specs]
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=fix) from None
    except (ValueError, EOFError, zipfile.BadZipFile, IsADirectoryError, KeyError) as error:
        why = "holds Python objects, which are never loaded" if "pickle" in str(error) else f"is no .npz file: {error}"
        raise BadInput(why, where=str(path), fix=fix) from error


def _checked(path: Path, spec: TensorSpec, array: Array) -> Array:
    place = f"{path}: {spec.name}"
    if spec.dtype == "object" and array.dtype.kind in "SU":
        array = np.char.encode(array, "utf-8").astype(object) if array.dtype.kind == "U" else array.astype(object)
    if array.dtype.name != spec.dtype:
        raise BadInput(
            f"has the dtype {array.dtype.name}, the model takes {spec.dtype}",
            where=place,
            fix=f"convert it with .astype({spec.dtype!r}) before saving",
        )
    own = spec.dims[1:] if spec.batched else spec.dims
    fits = array.ndim == len(own) + 1 and all(
        size == dim if isinstance(dim, int) else dim.minimum <= size <= dim.maximum
        for dim, size in zip(own, array.shape[1:], strict=True)
    )
    if not fits:
        raise BadInput(
            f"has the shape {list(array.shape)}, the model takes {describe(spec)}",
            where=place,
            fix="give it a first axis that counts samples, then the dims of one sample",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array))[0][0])
        raise BadInput(f"has a value that is NaN or infinite in sample {bad}", where=place, fix="drop that sample")
    return array
