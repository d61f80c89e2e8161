"""TensorSpec: the one statement of what goes into a model and what comes out.

The export, the Triton config, warm-up requests and load payloads are all derived from it.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelathe.errors import BadInput, RequestRejected

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Seed = int | Sequence[int] | np.random.Generator

TRITON_DTYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
}
NUMPY_DTYPES = {triton: numpy for numpy, triton in TRITON_DTYPES.items()}


@dataclass(frozen=True)
class Dim:
    """A named dimension with the range of sizes that it takes (`minimum` ≤ `typical` ≤ `maximum`, all ≥ 1)."""

    name: str
    minimum: int
    typical: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.typical <= self.maximum:
            raise BadInput(
                f"dim {self.name!r} needs 1 <= minimum <= typical <= maximum, "
                f"got {self.minimum}, {self.typical}, {self.maximum}"
            )

    def takes(self, size: int) -> bool:
        """Whether the dim may have this size; where nobody stated its sizes, it may be 0."""
        return self.minimum <= size <= self.maximum or (size == 0 and self.maximum == UNBOUNDED)


UNBOUNDED = 2**31 - 1
"""The `maximum` of a `Dim` whose sizes nobody stated, as of a -1 in a server's metadata."""

BATCH = Dim("batch", 1, 8, 64)
"""The usual first dimension of a batched tensor. A `Dim` named `batch` that stands first is the batch axis."""

UNBATCHED = "samples"
"""What the batch axis is called where the server forms no batches."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype and dims of one input or output.

    Args:
        name: as the model's forward argument or the exported graph calls it.
        dtype: a numpy name, such as `float32` or `int64`.
        dims: each an int or a `Dim`; the batch axis, when there is one, is a `Dim` named `batch` in the first place.
        values: for an input, the inclusive range that generated values are drawn from; None means [0, 1).
        examples: for an input of strings, what generated values are drawn from, the smallest first; numbers as text
            where there are none.
    """

    name: str
    dtype: str
    dims: tuple[int | Dim, ...]
    values: tuple[float, float] | None = None
    examples: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in TRITON_DTYPES:
            raise BadInput(
                f"tensor {self.name!r} has the dtype {self.dtype!r}", fix=f"use one of {', '.join(TRITON_DTYPES)}"
            )
        object.__setattr__(self, "dims", tuple(self.dims))

    @property
    def batched(self) -> bool:
        """Whether the first dim is the batch axis."""
        return bool(self.dims) and isinstance(self.dims[0], Dim) and self.dims[0].name == "batch"

    @property
    def own(self) -> tuple[int | Dim, ...]:
        """The dims of one sample: all but the batch axis."""
        return self.dims[1:] if self.batched else self.dims

    @property
    def served(self) -> "TensorSpec":
        """The spec as requests and answers carry it: a sample that is a single number has one dim of size 1 there."""
        return self if self.own else replace(self, dims=(*self.dims, 1))

    @property
    def unbatched(self) -> "TensorSpec":
        """The spec for a server that forms no batches: its batch axis is a dim like others."""
        if not self.batched or not isinstance(self.dims[0], Dim):
            return self
        return replace(self, dims=(replace(self.dims[0], name=UNBATCHED), *self.dims[1:]))

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether one sample may have this shape."""
        return len(shape) == len(self.own) and all(
            size == dim if isinstance(dim, int) else dim.takes(size) for dim, size in zip(self.own, shape, strict=True)
        )

    @property
    def largest_batch(self) -> int:
        """The most samples of one request; 1 without a batch axis."""
        return self.dims[0].maximum if self.batched and isinstance(self.dims[0], Dim) else 1

    def shape(self, batch: int | None = None, size: str = "typical") -> tuple[int, ...]:
        """Return a concrete shape: `size` (minimum, typical, maximum) for every `Dim`, `batch` for the batch axis."""
        dims = [getattr(dim, size) if isinstance(dim, Dim) else dim for dim in self.dims]
        if self.batched and batch is not None:
            dims[0] = batch
        return tuple(dims)

    def generate(self, rng: np.random.Generator, batch: int | None = None, size: str = "typical") -> Array:
        """Return random values in range, of `self.shape(batch, size)`."""
        shape = self.shape(batch, size)
        if self.dtype == "object":
            examples = self.examples[:1] if size == "minimum" else self.examples
            drawn = rng.integers(0, len(examples) or 10**6, int(np.prod(shape)))
            words = [examples[number] if examples else b"%d" % number for number in drawn]
            return np.array(words, dtype=object).reshape(shape)
        low, high = self.values or (0, 1)
        if self.dtype == "bool" or np.issubdtype(np.dtype(self.dtype), np.integer):
            return rng.integers(int(low), int(high), shape, endpoint=True).astype(self.dtype)
        return rng.uniform(low, high, shape).astype(self.dtype)

    def document(self) -> dict[str, Any]:
        """Return the JSON form, as `lineage.json` holds it."""
        dims = [
            {"name": dim.name, "min": dim.minimum, "typical": dim.typical, "max": dim.maximum}
            if isinstance(dim, Dim)
            else dim
            for dim in self.dims
        ]
        examples = {"examples": [b64encode(example).decode() for example in self.examples]} if self.examples else {}
        return {"name": self.name, "dtype": self.dtype, "dims": dims, "values": self.values, **examples}

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> "TensorSpec":
        """Return the spec that `document()` described."""
        dims = tuple(
            Dim(dim["name"], dim["min"], dim["typical"], dim["max"]) if isinstance(dim, dict) else int(dim)
            for dim in document["dims"]
        )
        values = document.get("values")
        examples = tuple(map(b64decode, document.get("examples", ())))
        return TensorSpec(document["name"], document["dtype"], dims, tuple(values) if values else None, examples)


def generated(specs: Iterable[TensorSpec], batch: int | None = None, seed: Seed = 0) -> dict[str, Array]:
    """Return random values in range by name, each of its spec's `shape(batch)`; equal seeds give equal values.

    A generator is a seed too: it goes on where it stands.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: spec.generate(rng, batch) for spec in specs}


def stated_spec(tensor: Mapping[str, Any], max_batch: int) -> TensorSpec:
    """Return the spec of a tensor as a server's metadata state it.

    Args:
        tensor: its `name`, `datatype` and `shape`.
        max_batch: of the model's configuration; 0 where the first axis is not the batch's.

    Raises:
        RequestRejected: it has a type that cannot be sent.
    """
    name, dtype = tensor["name"], tensor["datatype"]
    if dtype not in NUMPY_DTYPES:
        raise RequestRejected(
            f"the tensor {name!r} has the type {dtype}", fix=f"types that can be sent: {', '.join(NUMPY_DTYPES)}"
        )
    dims: list[int | Dim] = []
    for axis, size in enumerate(int(size) for size in tensor["shape"]):
        if axis == 0 and max_batch > 0:
            dims.append(Dim("batch", 1, min(8, max_batch), max_batch))
        elif size < 0:
            dims.append(Dim(f"{name}_{axis}", 1, 1, UNBOUNDED))
        else:
            dims.append(size)
    return TensorSpec(name, NUMPY_DTYPES[dtype], tuple(dims))


def reshaped(specs: Sequence[TensorSpec], tensors: Iterable[Mapping[str, Any]]) -> list[TensorSpec]:
    """Return the specs of a model's own tensors, by those of requests and what a model's configuration says of them."""
    single = {tensor["name"] for tensor in tensors if "reshape" in tensor and not tensor["reshape"].get("shape")}
    return [replace(spec, dims=spec.dims[:-1]) if spec.name in single else spec for spec in specs]


def in_bytes(array: Array) -> Array:
    """Return an array of strings as bytes, which JSON holds as text."""
    if array.dtype != object:
        return array
    flat = [value.encode() if isinstance(value, str) else value for value in array.ravel()]
    made = np.empty(len(flat), object)
    made[:] = flat
    return made.reshape(array.shape)


def packed(array: Array) -> bytes:
    """Return the bytes of a binary tensor: little-endian values, row by row; strings each behind their length."""
    if array.dtype == object:
        from tritonclient.utils import serialize_byte_tensor

        packed = serialize_byte_tensor(array)
        return bytes(packed.item()) if packed.size else b""
    return np.ascontiguousarray(array).tobytes()


def unpacked(datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Return the tensor whose bytes these are, the reverse of `packed`."""
    if datatype == "BYTES":
        from tritonclient.utils import deserialize_bytes_tensor

        strings: Array = deserialize_bytes_tensor(raw)
        return strings.reshape(shape)
    return np.frombuffer(raw, NUMPY_DTYPES[datatype]).reshape(shape)
