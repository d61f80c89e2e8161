"""Answers: which requests the stub refuses, in the server's words, and what it answers the others. No protocol here."""

import itertools
import math
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelathe.tensors import NUMPY_DTYPES, TRITON_DTYPES, Array, Dim, TensorSpec
from serve.repository import interface
from serve.repository import tree as repositories
from serve.repository.interface import Interface

NAME = "modelathe stub"
EXTENSIONS = ("sequence", "model_repository", "model_configuration", "binary_tensor_data", "parameters", "statistics")
Answers = Literal["zeros", "random"]


class Refused(Exception):
    """A request that is answered with an error; `status` is HTTP's."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


@dataclass(frozen=True)
class Given:
    """An input as a request describes it; `size` is its data's in bytes, for strings their number."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    size: int


@dataclass
class Counts:
    """What a version was asked, as a server's statistics have it."""

    success: int = 0
    fail: int = 0
    samples: int = 0


@dataclass
class Stub:
    """The models of a repository and what they answer. Its methods may be called from several threads.

    Args:
        models: the interfaces of each model's versions, by number.
        answers: zeros, or values that are drawn once for each output.
        latency: seconds until an answer is sent.
        fail_every: of so many inferences the last one fails; 0 for none.
    """

    models: Mapping[str, Mapping[int, Interface]]
    answers: Answers = "zeros"
    latency: float = 0.0
    fail_every: int = 0
    counts: dict[tuple[str, int], Counts] = field(default_factory=dict)
    _calls: Any = field(default_factory=lambda: itertools.count(1))
    _sequences: set[tuple[str, Any]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, model: str, version: str = "") -> Interface:
        """Return the version that answers for `version`; the highest where that is empty."""
        versions = self.models.get(model)
        if versions is None:
            raise Refused(404, f"Request for unknown model: '{model}' is not found")
        number = _number(version) or max(versions)
        if number not in versions:
            raise Refused(404, f"Request for unknown model: '{model}' version {number} is not found")
        return versions[number]

    def ready(self, model: str, version: str = "") -> bool:
        """Whether there is such a version."""
        number = _number(version)
        return model in self.models and (not number or number in self.models[model])

    def chosen(self, model: str, version: str = "") -> list[Interface]:
        """Return the versions that a question for statistics means; of all models where `model` is empty."""
        if model and not self.ready(model, version):
            raise Refused(400, f"requested model '{model}' is not available")
        named = [self.models[model]] if model else self.models.values()
        return [one for versions in named for one in versions.values() if _number(version) in (0, one.number)]

    def index(self) -> list[dict[str, str]]:
        """Return every version as a server's index lists it."""
        return [
            {"name": name, "version": str(number), "state": "READY"}
            for name in self.models
            for number in self.models[name]
        ]

    def infer(
        self, asked: Interface, inputs: Sequence[Given], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> dict[str, Array]:
        """Return the outputs of a request by name, all of them unless some are named, in the configuration's order.

        Raises:
            Refused: the server would refuse the request, or it is this one's turn to fail.
        """
        counts = self._counted(asked)
        try:
            if self.fail_every and next(self._calls) % self.fail_every == 0:
                raise Refused(500, f"the stub lets one of {self.fail_every} inferences fail, as it was told")
            _check(asked, inputs, outputs)
            if asked.config.HasField("sequence_batching"):
                self._check_sequence(asked, inputs, parameters)
        except Refused:
            with self._lock:
                counts.fail += 1
            raise
        with self._lock:
            counts.success += 1
            counts.samples += inputs[0].shape[0] if asked.config.max_batch_size and inputs else 1
        sizes: dict[str, int] = {"batch": 1}
        specs = {spec.name: spec for spec in asked.inputs}
        for tensor in inputs:
            sizes |= {
                dim.name: size
                for dim, size in zip(specs[tensor.name].dims, tensor.shape, strict=True)
                if isinstance(dim, Dim)
            }
        return {spec.name: self._values(spec, sizes) for spec in asked.outputs if not outputs or spec.name in outputs}

    def _counted(self, asked: Interface) -> Counts:
        with self._lock:
            return self.counts.setdefault((asked.model, asked.number), Counts())

    def _values(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
        shape = tuple(sizes.get(dim.name, 1) if isinstance(dim, Dim) else dim for dim in spec.dims)
        if self.answers == "random":
            return replace(spec, dims=shape).generate(np.random.default_rng(list(spec.name.encode())))
        return np.full(shape, b"", object) if spec.dtype == "object" else np.zeros(shape, spec.dtype)

    def _check_sequence(self, asked: Interface, inputs: Sequence[Given], parameters: Mapping[str, Any]) -> None:
        model, sequence = asked.model, parameters.get("sequence_id", 0)
        if not sequence:
            raise Refused(
                400, f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID"
            )
        if asked.config.max_batch_size and inputs[0].shape[0] != 1:
            raise Refused(
                400,
                f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence "
                "batcher",
            )
        with self._lock:
            if not parameters.get("sequence_start") and (model, sequence) not in self._sequences:
                raise Refused(
                    400,
                    f"inference request for sequence {sequence} to model '{model}' must specify the START flag on the "
                    "first request of the sequence",
                )
            change = self._sequences.discard if parameters.get("sequence_end") else self._sequences.add
            change((model, sequence))


def load(place: Path, answers: Answers = "zeros", latency: float = 0.0, fail_every: int = 0) -> Stub:
    """Return a stub of the repository `place`; neither model files nor lineages need be there. The rest as in `Stub`.

    Raises:
        BadRepository: there is no model, or a configuration does not say what it takes and gives.
    """
    models = {}
    for model in repositories.models(place):
        stated = list(repositories.config(place, model).version_policy.specific.versions)
        numbers = repositories.live(place, model) or stated or [1]
        models[model] = {number: interface.read(place, model, number) for number in numbers}
    return Stub(models, answers, latency, fail_every)


def _number(version: str) -> int:
    """Return a version as a number, 0 where none is asked for."""
    if version and not (version.isascii() and version.isdecimal() and int(version)):
        raise Refused(
            400,
            f"failed to get model version from specified version string '{version}', version should be an integral "
            "value > 0",
        )
    return int(version or 0)


def size(raw: bytes, datatype: str) -> int:
    """Return the `size` of a binary tensor for `Given`."""
    if datatype != "BYTES":
        return len(raw)
    count = at = 0
    while at + 4 <= len(raw):
        at += 4 + int(struct.unpack_from("<I", raw, at)[0])
        count += at <= len(raw)
    return count


def metadata(asked: Interface, numbers: Sequence[int]) -> dict[str, Any]:
    """Return what a server's metadata says of a model: names, datatypes and shapes, -1 where a size changes."""
    described = {
        kind: [{"name": spec.name, "datatype": TRITON_DTYPES[spec.dtype], "shape": list(_dims(spec))} for spec in specs]
        for kind, specs in (("inputs", asked.inputs), ("outputs", asked.outputs))
    }
    platform = asked.config.platform or asked.config.backend
    return {"name": asked.model, "versions": [str(number) for number in numbers], "platform": platform, **described}


def _dims(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, Dim) else dim for dim in spec.dims)


def _check(asked: Interface, inputs: Sequence[Given], outputs: Sequence[str]) -> None:
    model, specs = asked.model, {spec.name: spec for spec in asked.inputs}
    names = [tensor.name for tensor in inputs]
    missing = [name for name in specs if name not in names and name not in asked.optional]
    if len(set(names)) < len(names):
        raise Refused(400, f"input '{next(name for name in names if names.count(name) > 1)}' already exists in request")
    if len(names) > len(specs) or (missing and len(names) < len(specs)):
        raise Refused(
            400,
            f"expected {len(specs)} inputs but got {len(names)} inputs for model '{model}'. Got input(s) "
            f"{_listed(names)}, but missing required input(s) {_listed(missing)}. Please provide all required "
            "input(s).",
        )
    for name in names:
        if name not in specs:
            raise Refused(400, f"unexpected inference input '{name}' for model '{model}'")
    for name in outputs:
        if name not in [spec.name for spec in asked.outputs]:
            raise Refused(400, f"unexpected inference output '{name}' for model '{model}'")
    for tensor in inputs:
        _check_tensor(asked, tensor, specs[tensor.name])
    if asked.config.max_batch_size and len({tensor.shape[0] for tensor in inputs}) > 1:
        raise Refused(400, f"input '{names[0]}' batch size does not match other inputs for '{model}'")


def _check_tensor(asked: Interface, tensor: Given, spec: TensorSpec) -> None:
    model, name, largest = asked.model, tensor.name, asked.config.max_batch_size
    wanted, dims = TRITON_DTYPES[spec.dtype], _dims(spec)
    if tensor.datatype != wanted:
        raise Refused(
            400, f"inference input '{name}' data-type is '{tensor.datatype}', but model '{model}' expects '{wanted}'"
        )
    if largest and tensor.shape and tensor.shape[0] > largest:
        raise Refused(400, f"inference request batch-size must be <= {largest} for '{model}'")
    if len(dims) != len(tensor.shape) or any(
        dim not in (-1, size) for dim, size in zip(dims, tensor.shape, strict=True)
    ):
        got, expected = (",".join(map(str, shape)) for shape in (tensor.shape, dims))
        raise Refused(
            400, f"unexpected shape for input '{name}' for model '{model}'. Expected [{expected}], got [{got}]."
        )
    # A batch of nothing counts as one sample, so that its data are missing.
    elements = math.prod(tensor.shape[1:]) * (tensor.shape[0] or 1) if largest else math.prod(tensor.shape)
    if wanted == "BYTES":
        if tensor.size != elements:
            raise Refused(
                400,
                f"expected {elements} string elements for inference input '{name}' for model '{model}', "
                f"got {tensor.size}",
            )
    elif tensor.size != (expected_size := elements * np.dtype(NUMPY_DTYPES[wanted]).itemsize):
        raise Refused(
            400,
            f"input byte size mismatch for input '{name}' for model '{model}'. Expected {expected_size}, "
            f"got {tensor.size}",
        )


def _listed(names: Sequence[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
