"""Endpoint: a model behind a Triton server as a predictor."""

from collections.abc import Sequence
from functools import cached_property
from typing import Self
from urllib.parse import urlsplit

import numpy as np

from modelathe.client import connect
from modelathe.errors import UsageError
from modelathe.tensors import Array, Arrays, TensorSpec
from optimize.predict.predictor import cut


def to_served(specs: Sequence[TensorSpec], arrays: Arrays) -> dict[str, Array]:
    """Return arrays of the shapes that `specs` state as requests carry them (`TensorSpec.served`)."""
    single = {spec.name for spec in specs if not spec.own}
    return {name: array[..., None] if name in single else array for name, array in arrays.items()}


def from_served(specs: Sequence[TensorSpec], arrays: Arrays) -> dict[str, Array]:
    """Return the arrays of an answer in the shapes that `specs` state, the reverse of `to_served`."""
    single = {spec.name for spec in specs if not spec.own}
    return {
        name: array[..., 0] if name in single and array.shape[-1:] == (1,) else array for name, array in arrays.items()
    }


class EndpointPredictor:
    """A model behind a Triton endpoint: `grpc://HOST:PORT/MODEL[/VERSION]`, or the same with `http`.

    A batch that is larger than the server takes is sent in pieces.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        model, _, self._version = parts.path.strip("/").partition("/")
        if parts.scheme not in ("grpc", "http") or not parts.netloc or not model:
            raise UsageError(f"{url!r} is not an endpoint", fix="write grpc://HOST:PORT/MODEL[/VERSION], or http://…")
        self.name, self._model = "endpoint", model
        self._client = connect(f"{parts.scheme}://{parts.netloc}")

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return what the server answers for one batch."""
        specs, outputs = self._specs
        largest = min((spec.largest_batch for spec in specs if spec.batched), default=None)
        answers = [
            self._client.infer(self._model, to_served(specs, piece), version=self._version)
            for piece in cut(inputs, largest)
        ]
        return from_served(outputs, {name: np.concatenate([one[name] for one in answers]) for name in answers[0]})

    @cached_property
    def _specs(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        return self._client.metadata(self._model, self._version, own=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the connection."""
        self._client.close()
