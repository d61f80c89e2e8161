"""Answers: whether a server that is under load still answers right.

The reference is what it answered to the same request when nothing else was going on. Batch mates may change a sample's
outputs a little, so the caller says how much is allowed.
"""

from collections.abc import Callable, Mapping

import numpy as np

from loadtest.tensors import Array, Arrays

EXACT = 1e-5
MARGIN = 1.5
"""The largest of a few measured deviations understates the largest of the thousands that a load test sees."""


def tolerance(deviation: float) -> float:
    """Return what to allow a model whose outputs were seen to move by `deviation` with their batch mates."""
    return EXACT + MARGIN * deviation


class Answers:
    """Compares answers with their references.

    Args:
        references: by payload number the right outputs and the largest absolute difference that a floating-point output
            may show; others must be equal. Other payloads are not checked.
    """

    def __init__(self, references: Mapping[int, tuple[Arrays, float]]) -> None:
        self.checked = 0
        self.references = references
        self._seen: dict[int, bytes] = {}

    def wrong(self, payload: int, raw: bytes, decode: Callable[[], dict[str, Array]]) -> str:
        """Return what is wrong with an answer, or an empty text.

        Args:
            payload: its number.
            raw: the bytes of all outputs. Bytes that were right before need no decoding.
            decode: makes the arrays.
        """
        if payload not in self.references:
            return ""
        self.checked += 1
        if self._seen.get(payload) == raw:
            return ""
        outputs, (reference, tolerance) = decode(), self.references[payload]
        if outputs.keys() != reference.keys():
            return f"the outputs are {', '.join(outputs)} instead of {', '.join(reference)}"
        for name, array in outputs.items():
            if text := _differs(array, reference[name], tolerance):
                return f"output {name} {text}"
        self._seen[payload] = raw
        return ""


def _differs(array: Array, reference: Array, tolerance: float) -> str:
    if array.shape != reference.shape or array.dtype != reference.dtype:
        return f"is {array.dtype}{list(array.shape)} instead of {reference.dtype}{list(reference.shape)}"
    if array.dtype.kind != "f":
        return "" if np.array_equal(array, reference) else "has other values"
    # NaN in the reference is the model's own affair and must be NaN again.
    if np.allclose(array, reference, rtol=0, atol=tolerance, equal_nan=True):
        return ""
    return f"differs by more than {tolerance:g}"
