"""Request: what every kind of data comes down to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtest.plan.data.payload import check_batch
from modelathe.errors import BadInput
from modelathe.tensors import Arrays, TensorSpec


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, the inputs that a request may leave out, and whether it is made for NaN in them."""

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec] = ()
    optional: frozenset[str] = frozenset()
    nonfinite: bool = False


@dataclass(frozen=True)
class Request:
    """One request, or one sample of a request: the inputs by name, and the right outputs where the data states them."""

    inputs: Arrays
    outputs: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The requests of a file or folder.

    Args:
        requests: in the order of the data.
        streams: how many of them, one after the other, make up each sequence; empty for requests of their own.
    """

    requests: Sequence[Request]
    streams: Sequence[int] = ()

    @property
    def payloads(self) -> list[Arrays]:
        """The inputs of every request."""
        return [request.inputs for request in self.requests]

    @property
    def expected(self) -> list[Arrays]:
        """The right outputs of every request, empty where they are not stated; no element if they never are."""
        found = [request.outputs for request in self.requests]
        return found if any(found) else []


def batched(where: str, samples: Sequence[Request], signature: Signature, batch: int) -> list[Request]:
    """Return requests of `batch` samples each; samples that do not fill the last one are left out.

    A model without a batch axis gets one sample per request as it is.

    Raises:
        UsageError: the model takes no such batch.
        BadInput: there are too few samples, samples of one request differ in shape, or one is not finite.
    """
    finite(where, samples, signature, "sample")
    check_batch(signature.inputs, batch)
    if len(samples) < batch:
        raise BadInput(f"has {len(samples)} samples, a request takes {batch}", where=where, fix="use a smaller --batch")
    starts = range(0, len(samples) - batch + 1, batch)
    return [_stacked(where, at, samples[at : at + batch], signature) for at in starts]


def finite(where: str, requests: Sequence[Request], signature: Signature, what: str = "") -> Sequence[Request]:
    """Return the requests, whose inputs are finite unless the model is made for others.

    What an output should be is the model's own affair, minus infinity where something is masked for one; but NaN is
    equal to nothing, and is no right answer unless the model is made for it.

    Args:
        where: the place, of which a message names the `what` by its number too, if that is said.
        requests: all of it, or the samples of requests.
        signature: of the model.
        what: each of them is.

    Raises:
        BadInput: the first that is not.
    """
    for number, request in enumerate(() if signature.nonfinite else requests):
        place = f" in {what} {number}" if what else ""
        for name, array in request.outputs.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                fix = "state the right answer, or drop that sample"
                raise BadInput(f"the right {name} is NaN{place}, which is equal to nothing", where=where, fix=fix)
        for name, array in request.inputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                fix = "drop that sample; a load of a model that is made for it takes --allow-nonfinite"
                raise BadInput(f"{name} has a value that is NaN or infinite{place}", where=where, fix=fix)
    return requests


def _stacked(where: str, first: int, samples: Sequence[Request], signature: Signature) -> Request:
    def stack(rows: Sequence[Arrays], specs: Sequence[TensorSpec]) -> Arrays:
        known = [spec for spec in specs if all(spec.name in row for row in rows)]
        return {
            spec.name: np.stack([row[spec.name] for row in rows]) if spec.batched else rows[0][spec.name]
            for spec in known
        }

    kinds = [frozenset(sample.inputs) for sample in samples]
    if len(set(kinds)) > 1:
        raise BadInput(
            f"samples {first} to {first + len(samples) - 1} leave out different inputs and cannot be one batch",
            where=where,
            fix="sort the samples by their inputs, or use --batch 1",
        )
    try:
        return Request(
            stack([sample.inputs for sample in samples], signature.inputs),
            stack([sample.outputs for sample in samples], signature.outputs),
        )
    except ValueError:
        raise BadInput(
            f"samples {first} to {first + len(samples) - 1} differ in shape and cannot be one batch",
            where=where,
            fix="sort the samples by shape, or use --batch 1",
        ) from None
