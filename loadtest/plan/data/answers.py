"""Answers: whether a server that is under load still answers right.

The reference is what the data states, or what the server answered to the same request when nothing else was going on.
Batch mates may change a sample's outputs a little, so the caller says how much is allowed.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from modelathe.tensors import Array, Arrays

EXACT = 1e-5
MARGIN = 1.5
"""The largest of a few measured deviations understates the largest of the thousands that a load test sees."""


MOST_SAMPLES = 10
"""Wrong answers that a run shows."""
_LONGEST = 100


SURE = 0.999
"""So likely does chance not change more labels than are allowed."""

Tolerance = float | Mapping[str, float]
"""The largest absolute difference that is allowed: of every output, or by output, for their scales may differ.

By output, that of one which is no floating-point number, a label say, is the share of the samples that may change.
"""


def tolerance(deviation: Tolerance) -> Tolerance:
    """Return what to allow a model whose outputs were seen to move by `deviation` with their batch mates."""
    if isinstance(deviation, Mapping):
        return {output: EXACT + MARGIN * moved for output, moved in deviation.items()}
    return EXACT + MARGIN * deviation


def allowed(tolerance: Tolerance, output: str) -> float:
    """Return what is allowed of one output; of one that was never seen to move, rounding."""
    return tolerance.get(output, EXACT) if isinstance(tolerance, Mapping) else tolerance


def may_change(tolerance: Tolerance, output: str, samples: int) -> int:
    """Return in how many of so many samples an output that is no floating-point number may be another one."""
    share = tolerance.get(output, EXACT) - EXACT if isinstance(tolerance, Mapping) else 0.0
    if not share > 0:
        return 0
    from scipy import stats  # takes half a second, and few models need it

    return int(stats.binom.ppf(SURE, samples, min(share, 1.0)))


class Answers:
    """Compares answers with their references, counts them and keeps the first few that were wrong.

    Args:
        references: by payload number the right outputs and what is allowed of them. Payloads without one, and outputs
            that it does not name, are not checked.

    Attributes:
        checked: how many answers were compared.
        samples: of wrong answers: the request `n`, its `payload`, the `output`, the `index` of the element that is
            furthest off, what was `expected` there and what was `got`; without an index where the form was wrong.
    """

    def __init__(self, references: Mapping[int, tuple[Arrays, Tolerance]]) -> None:
        self.references = references
        self._seen: dict[int, bytes] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the counts and samples, as after a warm-up."""
        self.checked, self.samples, self._changed = 0, list[dict[str, Any]](), Counter[str]()

    def wrong(self, n: int, payload: int, raw: bytes, decode: Callable[[], dict[str, Array]]) -> str:
        """Return what is wrong with an answer, or an empty text.

        Args:
            n: the request's number.
            payload: its payload's.
            raw: the bytes of the answer, descriptions of the outputs included. Bytes that were right before need no
                decoding.
            decode: makes the arrays.
        """
        if payload not in self.references:
            return ""
        self.checked += 1
        if self._seen.get(payload) == raw:
            return ""
        reference, tolerance = self.references[payload]
        try:
            outputs = decode()
        except Exception as error:  # what decoders say about bytes that are no tensors has no common class
            self._keep(n, payload, "", {"index": None, "expected": ", ".join(reference), "got": repr(error)[:_LONGEST]})
            return f"the outputs cannot be read: {error!r}"
        same = True
        for name, array in reference.items():
            difference = _difference(outputs.get(name), array, allowed(tolerance, name))
            if difference and not self._seldom(name, outputs.get(name), array, tolerance):
                text, place = difference
                self._keep(n, payload, name, place)
                return f"output {name} {text}"
            same = same and not difference
        if same:  # a label that may change now and then is counted each time
            self._seen[payload] = raw
        return ""

    def _seldom(self, output: str, array: Array | None, reference: Array, tolerance: Tolerance) -> bool:
        """Count the samples of which a label is another one; return whether all so far are no more than may be."""
        if array is None or array.dtype.kind == "f" or _form(array) != _form(reference):
            return False
        rows = len(np.atleast_1d(reference))
        self._changed[output] += int((array != reference).reshape(rows, -1).any(axis=1).sum())
        return self._changed[output] <= may_change(tolerance, output, rows * self.checked)

    def _keep(self, n: int, payload: int, output: str, place: dict[str, Any]) -> None:
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append({"n": n, "payload": payload, "output": output, **place})


def _difference(array: Array | None, reference: Array, tolerance: float) -> tuple[str, dict[str, Any]] | None:
    """Return how an output differs and where most, None if it is right."""
    if array is None:
        return "is missing", {"index": None, "expected": _form(reference), "got": "nothing"}
    if array.shape != reference.shape or array.dtype != reference.dtype:
        got, expected = _form(array), _form(reference)
        return f"is {got} instead of {expected}", {"index": None, "expected": expected, "got": got}
    if array.dtype.kind != "f":
        if np.array_equal(array, reference):
            return None
        return "has other values", _at(int(np.argmax(array != reference)), array, reference)
    # NaN in the reference is the model's own affair and must be NaN again.
    if np.allclose(array, reference, rtol=0, atol=tolerance, equal_nan=True):
        return None
    with np.errstate(invalid="ignore"):
        apart = np.abs(array.astype(np.float64) - reference)
    same = (array == reference) | (np.isnan(array) & np.isnan(reference))
    apart = np.where(same, 0.0, np.nan_to_num(apart, nan=np.inf, posinf=np.inf))
    return f"differs by more than {tolerance:g}", _at(int(apart.argmax()), array, reference)


def _form(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _at(place: int, array: Array, reference: Array) -> dict[str, Any]:
    index = [int(at) for at in np.unravel_index(place, array.shape)]
    return {"index": index, "expected": _shown(reference.flat[place]), "got": _shown(array.flat[place])}


def _shown(value: Any) -> bool | int | float | str:
    """Return a value as JSON can hold it."""
    if isinstance(value, bytes):
        return value[:_LONGEST].decode("utf-8", "replace")
    plain: bool | int | float = value.item()
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain
