"""Data: the sets of a workload beside each other."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modelathe.tensors import Array
from optimize.checks.finding import Finding, ok, warning
from optimize.checks.subject import LOOKED_AT, Subject
from optimize.model.randomness import Stream
from optimize.source import splits
from optimize.source.batch import Batch

APART = 4.0
"""So many times as wide as the other is a set's spread, or so many spreads away its mean, that is unlike it."""
CLASSES = 1000
"""More different whole numbers than these are no classes."""


def calibration(subject: Subject) -> Iterator[Finding]:
    """Compare the calibration samples with those that judge: their classes, and the sizes of their numbers.

    Raises:
        BadData: a batch is not as the workload declares.
    """
    if subject.workload.calibration is None:
        return
    with Stream(0).drawn():
        ours, theirs = ([*subject.some(kind)] for kind in ("calibration", "evaluation"))
    found = [*_unlike_inputs(subject, ours, theirs), *_missing_classes(ours, theirs)]
    yield from found
    if not found:
        count = sum(batch.size for batch in ours)
        yield ok("calibration", f"{count:,}{'+' if len(ours) == LOOKED_AT else ''} samples, like evaluation's")


def _unlike_inputs(subject: Subject, ours: list[Batch], theirs: list[Batch]) -> Iterator[Finding]:
    for spec in subject.workload.inputs:
        if np.dtype(spec.dtype).kind != "f":
            continue
        mine, other = (_mean_and_spread([batch.inputs[spec.name] for batch in part]) for part in (ours, theirs))
        wide = max(mine[1], other[1])
        if wide > APART * min(mine[1], other[1]) or abs(mine[0] - other[0]) > APART * wide:
            told = [f"{mean:.4g} ± {spread:.4g}" for mean, spread in (mine, other)]
            yield warning(
                "calibration",
                f"input {spec.name} is {told[0]} in calibration and {told[1]} in evaluation",
                "prepare both the same way: ranges for INT8 come from the one and must hold for the other",
            )


def _mean_and_spread(arrays: list[Array]) -> tuple[float, float]:
    count = sum(array.size for array in arrays)
    mean = sum(float(array.sum(dtype=np.float64)) for array in arrays) / max(count, 1)
    squares = sum(float(np.square(array - mean, dtype=np.float64).sum()) for array in arrays)
    return mean, float(np.sqrt(squares / max(count, 1)))


def _missing_classes(ours: list[Batch], theirs: list[Batch]) -> Iterator[Finding]:
    """Say which classes calibration never shows; nothing where it was not read to its end, or has no targets."""
    mine, other = (_classes(part) for part in (ours, theirs))
    if len(ours) == LOOKED_AT or not mine or not other:
        return
    if missing := sorted(other - mine):
        shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        yield warning(
            "calibration",
            f"{len(missing)} of the {len(other)} classes in evaluation never stand in calibration: {shown}",
            "draw calibration from the whole training set: it may be sorted by class",
        )


def _classes(batches: list[Batch]) -> set[int]:
    arrays = [array for batch in batches for array in _labels(batch.targets)]
    found = {int(value) for array in arrays for value in np.unique(array)}
    return found if len(found) <= CLASSES else set()


def _labels(targets: Any) -> list[Array]:
    several = targets.values() if isinstance(targets, Mapping) else [targets]
    arrays = [each for each in several if isinstance(each, np.ndarray) and each.dtype.kind in "iu" and each.ndim == 1]
    return arrays if len(arrays) == 1 else []


def sets(subject: Subject) -> Iterator[Finding]:
    """Read all sets and compare their samples.

    Raises:
        BadData: an evaluation sample stands in another set, or `evaluation()` changes from call to call.
    """
    found = splits.read(subject.workload, allow_overlap=subject.allow_overlap)
    subject.samples = found.samples["evaluation"]
    sizes = ", ".join(f"{kind} {count:,}" for kind, count in found.samples.items())
    for kind, count in found.overlap.items():
        what = f"{count:,} evaluation samples also stand in {kind}"
        yield warning("data", what, "judge on samples that nothing else has seen")
    yield ok("data", f"samples: {sizes}" + ("" if found.overlap else "; evaluation's stand in no other set"))
    for spec, stated in zip(subject.workload.inputs, splits.stated(subject.workload, found).inputs, strict=True):
        if spec != stated and stated.values:
            low, high = stated.values
            yield ok("data", f"generated values of {spec.name} go from {low:g} to {high:g}, as in evaluation")
