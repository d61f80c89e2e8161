"""A folder of payloads.

Four kinds, told apart by the names in it:

- `.npz` files: each is a whole request, batch axis included;
- files named like the inputs, `NAME` (raw bytes, as perf_analyzer takes them) or `NAME.npy`: one sample; files named
  like outputs hold the right ones;
- subfolders of that kind: one sample each;
- any other files, for a model with one input: each file is one sample; of a model that takes strings, as they are.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtest.plan.data import npz, values
from loadtest.plan.data.files import readable
from loadtest.plan.data.request import Data, Request, Signature, batched, finite
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import Array, TensorSpec

_FIX = "put one .npz file, one subfolder or one file per request into it"


def read(path: Path, signature: Signature, batch: int = 1) -> Data:
    """Return the requests of a folder, sorted by name; hidden files are passed over.

    Raises:
        BadInput: the folder is empty or a file in it cannot be used; the message names the file.
        UsageError: the model takes no batch of this size, or a batch was asked of whole requests.
    """
    with readable(path, "no folder", _FIX):
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise BadInput("the folder is empty", where=str(path), fix=_FIX)
    if all(entry.suffix == ".npz" for entry in entries):
        if batch != 1:
            raise UsageError("each .npz file of a folder is a whole request", fix="leave --batch away")
        return Data([_whole(entry, signature) for entry in entries])
    known = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    if any(_tensor_name(entry) in known for entry in entries):
        samples = [_set(path, signature)]
    elif all(entry.is_dir() for entry in entries):
        samples = [_set(entry, signature) for entry in entries]
    else:
        spec = values.only_input(str(path), signature.inputs)
        samples = [Request({spec.name: _alone(entry, spec)}) for entry in entries]
    return Data(batched(str(path), samples, signature, batch))


def _whole(path: Path, signature: Signature) -> Request:
    found = npz.load(path, signature)

    def checked(specs: Sequence[TensorSpec]) -> dict[str, Array]:
        return {
            spec.name: values.whole(f"{path}: {spec.name}", spec, found[spec.name])
            for spec in specs
            if spec.name in found
        }

    request = Request(checked(signature.inputs), checked(signature.outputs))
    return finite(str(path), [request], signature)[0]


def _tensor_name(path: Path) -> str:
    return path.name.removesuffix(".npy")


def _set(folder: Path, signature: Signature) -> Request:
    """Return the sample whose tensors are a file each."""
    with readable(folder, "no folder", _FIX):
        files = {_tensor_name(entry): entry for entry in folder.iterdir() if not entry.name.startswith(".")}
    values.names(str(folder), files, signature)

    def tensors(specs: Sequence[TensorSpec]) -> dict[str, Array]:
        return {spec.name: _tensor(files[spec.name], spec) for spec in specs if spec.name in files}

    return Request(tensors(signature.inputs), tensors(signature.outputs))


def _tensor(path: Path, spec: TensorSpec) -> Array:
    if path.suffix == ".npy" and path.name != spec.name:
        return values.sample(str(path), spec, npz.array(path))
    return values.shaped(str(path), spec, values.from_bytes(str(path), spec, _bytes(path)))


def _alone(path: Path, spec: TensorSpec) -> Array:
    if path.suffix != ".npy" and spec.dtype == "object":
        return np.full(values.string_shape(str(path), spec), _bytes(path), object)
    return _tensor(path, spec)


def _bytes(path: Path) -> bytes:
    with readable(path, "no file", _FIX):
        raw = path.read_bytes()
    return raw
