"""Predictor: named arrays in, named arrays out."""

from collections.abc import Iterator
from typing import Protocol, Self

from modelathe.tensors import Array, Arrays


def cut(inputs: Arrays, largest: int | None) -> Iterator[Arrays]:
    """Yield `inputs` in pieces of at most `largest` samples."""
    size = len(next(iter(inputs.values()), ()))
    for start in range(0, size, largest or max(size, 1)):
        yield {name: array[start : start + (largest or size)] for name, array in inputs.items()}


class Predictor(Protocol):
    """A context manager that answers `predict(arrays)`; every array has the batch axis first."""

    name: str

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name for one batch."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...
