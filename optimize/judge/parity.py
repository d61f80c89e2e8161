"""Parity: whether two places that run the same file answer alike, output by output.

Floating-point outputs may differ by a tolerance of their own: scores between 0 and 1 are not judged by the scale of the
boxes beside them. Others, such as labels, are the same or not, and may change in as few samples as the file's own
dependence on batch mates explains.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.plan.data.answers import Tolerance, allowed, may_change
from modelathe.tensors import Array, Arrays


def lane(name: str, pairs: Sequence[tuple[Arrays, Arrays]], tolerance: Tolerance) -> dict[str, Any]:
    """Compare answers with those that are wanted.

    Args:
        name: of the lane.
        pairs: an answer and the wanted one, of one sample or of several.
        tolerance: for all outputs, or by output: of a floating-point one the largest difference, of another the share
            of the samples that may change, which is none unless it is stated for that output.

    Returns:
        `lane`, `requests` (samples), `mismatched` (samples with an output beyond its tolerance), and of the `output`
        that is nearest to its tolerance or furthest beyond it `max_abs_diff` and `tolerance`: of a label, shares.
    """
    outputs = list(pairs[0][1]) if pairs else []
    judged = {output: _judged(output, pairs, tolerance) for output in outputs}
    wrong = np.logical_or.reduce([found["wrong"] for found in judged.values()]) if judged else np.zeros(0, bool)
    worst = max(outputs, key=lambda output: _excess(judged[output]), default="")
    return {
        "lane": name,
        "requests": len(wrong),
        "mismatched": int(wrong.sum()),
        "output": worst,
        "max_abs_diff": judged[worst]["largest"] if judged else 0.0,
        "tolerance": judged[worst]["allowed"] if judged else 0.0,
    }


def _judged(output: str, pairs: Sequence[tuple[Arrays, Arrays]], tolerance: Tolerance) -> dict[str, Any]:
    apart = np.concatenate([_rows(answer[output], wanted[output]) for answer, wanted in pairs])
    if pairs[0][1][output].dtype.kind == "f":
        limit = allowed(tolerance, output)
        # NaN is not within any tolerance.
        return {"wrong": ~(apart <= limit), "largest": float(apart.max()), "allowed": limit}
    changed = ~(apart == 0)
    most = may_change(tolerance, output, len(changed))
    # An answer of another form is no change of a label.
    wrong = changed if changed.sum() > most else np.isnan(apart)
    return {"wrong": wrong, "largest": float(changed.mean()), "allowed": most / len(changed)}


def _excess(found: Mapping[str, Any]) -> float:
    ratio = found["largest"] / found["allowed"] if found["allowed"] else found["largest"] * np.inf
    return float("inf") if np.isnan(ratio) and found["wrong"].any() else float(np.nan_to_num(ratio))


def _rows(array: Array, wanted: Array) -> NDArray[np.float64]:
    """Return for each sample how far its values are from the wanted ones; an answer of another form is NaN."""
    size = len(wanted)
    if array.shape != wanted.shape:
        return np.full(size, np.nan)
    if wanted.dtype.kind != "f":
        return np.asarray((array != wanted).reshape(size, -1).any(axis=1), np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(array == wanted, 0.0, np.abs(array.astype(np.float64) - wanted))
    return np.asarray(apart.reshape(size, -1).max(axis=1, initial=0.0), np.float64)
