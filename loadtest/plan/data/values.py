"""Values: tensors as JSON and bytes hold them, and whether they are what an input or output takes.

All functions name the place (file, request, tensor) in what they raise, which is `BadInput` and nothing else.
"""

import math
import struct
from base64 import b64decode
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from loadtest.plan.data.payload import describe
from loadtest.plan.data.request import Signature
from modelathe.errors import BadInput
from modelathe.tensors import Array, TensorSpec

_KINDS = {"b": "biu", "i": "iu", "u": "iu", "f": "iuf", "O": "O"}


def names(where: str, found: Iterable[str], signature: Signature, *, outputs: bool = True) -> None:
    """Check that all inputs are there but the optional ones, and nothing else but outputs, where these may be."""
    there, wanted = set(found), [spec.name for spec in signature.inputs]
    more = {spec.name for spec in signature.outputs} if outputs else set()
    if not set(wanted) - signature.optional <= there <= {*wanted, *more}:
        raise BadInput(
            f"has the arrays {', '.join(sorted(there)) or 'none'}; the model's inputs are {', '.join(wanted)}",
            where=where,
            fix="name one tensor for each input, and none that the model does not have",
        )


def typed(where: str, spec: TensorSpec, array: Array) -> Array:
    """Return an array of the spec's dtype; strings become bytes in an array of objects."""
    if spec.dtype == "object" and array.dtype.kind in "SU":
        array = np.char.encode(array, "utf-8").astype(object) if array.dtype.kind == "U" else array.astype(object)
    if array.dtype.name != spec.dtype:
        raise BadInput(
            f"has the dtype {array.dtype.name}, the model takes {spec.dtype}",
            where=where,
            fix=f"convert it with .astype({spec.dtype!r}) before saving",
        )
    return array


def columns(spec: TensorSpec, array: Array, rank: int) -> Array:
    """Return an array whose samples are single numbers as the column that requests carry.

    Args:
        spec: of the tensor as requests carry it.
        array: another one stays as it is.
        rank: how many dims stand before those of a sample.
    """
    return array[..., None] if spec.own == (1,) and array.ndim == rank else array


def sample(where: str, spec: TensorSpec, array: Array) -> Array:
    """Return an array of one sample, without the batch axis."""
    array = columns(spec, array, 0)
    if not spec.takes(array.shape):
        raise BadInput(
            f"has the shape {list(array.shape)}, the model takes {describe(spec)}",
            where=where,
            fix="give it the dims of one sample, without the batch axis",
        )
    return typed(where, spec, array)


def whole(where: str, spec: TensorSpec, array: Array) -> Array:
    """Return an array of a whole request, with the batch axis where the model has one."""
    array = columns(spec, array, int(spec.batched))
    if spec.batched:
        fits = array.ndim > 0 and 1 <= len(array) <= spec.largest_batch and spec.takes(array.shape[1:])
    else:
        fits = spec.takes(array.shape)
    if not fits:
        raise BadInput(
            f"has the shape {list(array.shape)}, the model takes {describe(spec)}",
            where=where,
            fix="give it all dims, the batch axis first where the model has one",
        )
    return typed(where, spec, array)


def from_json(where: str, spec: TensorSpec, content: Any, shape: Any = None, full: bool = False) -> Array:
    """Return the array that a JSON value states: a list, flat or nested, or `{"b64": …}`.

    Args:
        where: the place.
        spec: the tensor.
        content: what the file holds.
        shape: what the file says of the shape; None takes that of the spec.
        full: whether the value is a whole request's, batch axis included, rather than one sample's.
    """
    if isinstance(content, dict) and content.keys() == {"b64"}:
        array = from_bytes(where, spec, _decoded(where, content["b64"]))
    elif isinstance(content, list):
        array = _from_list(where, spec, content)
    else:
        raise BadInput('is neither a list nor a {"b64": …}', where=where, fix="write the values as a list")
    return shaped(where, spec, array, shape, full)


def shaped(where: str, spec: TensorSpec, array: Array, shape: Any = None, full: bool = False) -> Array:
    """Return flat values in the shape that the data states or else the spec; arguments as in `from_json`."""
    dims = _checked_shape(where, shape) if shape is not None else _open_shape(spec, array, full)
    try:
        array = array.reshape(dims)
    except ValueError:
        raise BadInput(
            f"has {array.size} values, the model takes {describe(spec)}"
            + (f" and the shape is {shape}" if shape is not None else ""),
            where=where,
            fix="give as many values as the shape has places; where the model leaves sizes open, state a shape",
        ) from None
    return (whole if full else sample)(where, spec, array)


def from_bytes(where: str, spec: TensorSpec, raw: bytes) -> Array:
    """Return the values that a binary tensor holds, without a shape: little-endian, strings behind their lengths."""
    if spec.dtype == "object":
        strings = list(_strings(where, raw))
        array = np.empty(len(strings), object)
        array[:] = strings
        return array
    size = np.dtype(spec.dtype).itemsize
    if len(raw) % size:
        raise BadInput(
            f"has {len(raw)} bytes, which is no whole number of {spec.dtype} values",
            where=where,
            fix=f"write it with .astype({spec.dtype!r}).tobytes()",
        )
    return np.frombuffer(raw, spec.dtype)


def _strings(where: str, raw: bytes) -> Iterable[bytes]:
    at = 0
    while at < len(raw):
        start = at + 4
        at = start + (struct.unpack_from("<I", raw, at)[0] if start <= len(raw) else 0)
        if at > len(raw) or start > len(raw):
            raise BadInput(
                "ends in the middle of a string", where=where, fix="write each string behind its length in 4 bytes"
            )
        yield raw[start:at]


def _decoded(where: str, text: Any) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise BadInput("is not base64", where=where, fix="write base64.b64encode(array.tobytes())") from None


def _from_list(where: str, spec: TensorSpec, content: list[Any]) -> Array:
    if spec.dtype == "object":
        return _text(where, content)
    try:
        array = np.array(content) if content else np.empty(0, spec.dtype)
    except (ValueError, OverflowError, TypeError):
        array = np.array(None)
    kinds = _KINDS[np.dtype(spec.dtype).kind]
    if array.dtype.kind not in kinds:
        raise BadInput(
            f"holds something else than {spec.dtype} values, or rows of different lengths",
            where=where,
            fix=f"write {'true and false' if kinds == 'b' else 'numbers'} only",
        )
    with np.errstate(over="ignore"):
        made = array.astype(spec.dtype)
    beyond = np.isinf(made) & ~np.isinf(array) if made.dtype.kind == "f" else made != array
    if beyond.any():
        raise BadInput(f"has a value beyond the range of {spec.dtype}", where=where, fix="correct that value")
    return made


def _text(where: str, content: list[Any]) -> Array:
    flat: list[bytes] = []
    rest = content[::-1]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest.extend(reversed(value))
        elif isinstance(value, str):
            flat.append(_utf8(where, value))
        else:
            raise BadInput(f"holds {value!r:.40}, which is no string", where=where, fix="write strings only")
    array = np.empty(len(flat), object)
    array[:] = flat
    return array


def _utf8(where: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadInput("holds half a surrogate pair, which is no text", where=where, fix="correct the text") from None


def _checked_shape(where: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise BadInput(f"has the shape {shape!r:.60}", where=where, fix="write a list of sizes, each 0 or more")
    if math.prod(shape) >= 2**62:
        raise BadInput(f"has the shape {shape}, which nothing can fill", where=where, fix="correct the shape")
    return shape


def _open_shape(spec: TensorSpec, array: Array, full: bool) -> list[int]:
    """Return the shape to give to values without one; -1 stands for the one size that the spec may leave open."""
    own = [dim if isinstance(dim, int) else -1 for dim in spec.own]
    if spec.takes(array.shape) or own.count(-1) > 1:
        return list(array.shape)
    if full and spec.batched:
        return [-1, *own] if -1 not in own else list(array.shape)
    return own


def only_input(where: str, inputs: Sequence[TensorSpec]) -> TensorSpec:
    """Return the one input of a model that has no other, for data that names none."""
    if len(inputs) != 1:
        raise BadInput(
            f"the model has the inputs {', '.join(spec.name for spec in inputs)}, and this data names none",
            where=where,
            fix="give an .npz file, JSON, or a folder with names in it",
        )
    return inputs[0]


def string_shape(where: str, spec: TensorSpec) -> tuple[int, ...]:
    """Return the shape of a sample that is one string; sizes that the spec leaves open are 1."""
    shape = (1,) * len(spec.own)
    if spec.dtype != "object" or not spec.takes(shape):
        raise BadInput(
            f"holds one string a sample, the model takes {describe(spec)}",
            where=where,
            fix="give an .npz file or JSON",
        )
    return shape
