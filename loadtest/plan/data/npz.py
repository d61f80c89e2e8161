"""An .npz file: one array for each input, the first axis counting samples; those of outputs are the right ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.plan.data import values
from loadtest.plan.data.files import readable
from loadtest.plan.data.payload import describe
from loadtest.plan.data.request import Data, Request, Signature, batched
from modelathe.errors import BadInput
from modelathe.tensors import Array, TensorSpec


def read(path: Path, signature: Signature, batch: int = 1) -> Data:
    """Return the samples of the file, cut into requests of `batch` samples.

    Args:
        path: the file. Samples that do not fill the last batch are left out.
        signature: of the model. One without a batch axis gets a sample per request, without that axis.
        batch: samples per request.

    Raises:
        BadInput: the file cannot be used; the message names the array and what is wrong with it.
        UsageError: the model takes no batch of this size.
    """
    found = load(path, signature)
    specs = [spec for spec in (*signature.inputs, *signature.outputs) if spec.name in found]
    arrays = {spec.name: _samples(path, spec, found[spec.name]) for spec in specs}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise BadInput(
            f"the arrays have different numbers of samples: {lengths}", where=str(path), fix="give each as many"
        )

    def row(specs: Sequence[TensorSpec], n: int) -> dict[str, Array]:
        return {spec.name: arrays[spec.name][n] for spec in specs if spec.name in arrays}

    count = next(iter(lengths.values()), 0)
    rows = [Request(row(signature.inputs, n), row(signature.outputs, n)) for n in range(count)]
    return Data(batched(str(path), rows, signature, batch))


def load(path: Path, signature: Signature) -> dict[str, Array]:
    """Return the arrays of the file: one for each input, and those of outputs that are in it."""
    fix = f"write it with numpy.savez({path.name!r}, {', '.join(f'{spec.name}=...' for spec in signature.inputs)})"
    with _opened(path, "no .npz file", fix) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise BadInput("holds one array without a name", where=str(path), fix=fix)
        values.names(str(path), file.files, signature)
        arrays = {name: file[name] for name in file.files}
    return arrays


def inputs(path: Path) -> list[TensorSpec]:
    """Return what the arrays of the file say of a model's inputs: names, dtypes, and the dims behind the samples'."""
    fix = f"write it with numpy.savez({path.name!r}, name=...)"
    with _opened(path, "no .npz file", fix) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise BadInput("holds one array without a name", where=str(path), fix=fix)
        arrays = {name: file[name] for name in file.files}
    return [
        TensorSpec(name, "object" if array.dtype.kind in "SU" else array.dtype.name, array.shape[1:])
        for name, array in arrays.items()
    ]


def array(path: Path) -> Array:
    """Return the array of an .npy file."""
    fix = f"write it with numpy.save({path.name!r}, array)"
    with _opened(path, "no .npy file", fix) as file:
        if not isinstance(file, np.ndarray):
            raise BadInput("holds several arrays", where=str(path), fix=fix)
    return np.asarray(file)


@contextmanager
def _opened(path: Path, what: str, fix: str) -> Iterator[Any]:
    # The file is opened here, because numpy leaves it open when it turns out to be no archive.
    with readable(path, what, fix), path.open("rb") as stream:
        try:
            yield np.load(stream, allow_pickle=False)
        except ValueError as error:
            if "Object arrays" not in str(error):
                raise
            raise BadInput("holds Python objects, which are never loaded", where=str(path), fix=fix) from None


def _samples(path: Path, spec: TensorSpec, array: Array) -> Array:
    array = values.columns(spec, array, 1)
    if array.ndim == 0 or not spec.takes(array.shape[1:]):
        raise BadInput(
            f"has the shape {list(array.shape)}, the model takes {describe(spec)}",
            where=f"{path}: {spec.name}",
            fix="give it a first axis that counts samples, then the dims of one sample",
        )
    return values.typed(f"{path}: {spec.name}", spec, array)
