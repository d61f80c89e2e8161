"""Calibration: the workload's calibration batches, read the way that ONNX Runtime's calibrators ask for them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.tensors import Array, Arrays
from optimize.errors import BadData
from optimize.workload import Batch, Workload

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader

FEWEST = 8
"""Samples below which a range is an accident."""


def samples(workload: Workload, limit: int) -> Iterator[dict[str, Array]]:
    """Yield the inputs of the first `limit` calibration samples, in the workload's own batches.

    Raises:
        BadData: a value is not finite, there are fewer samples than a range needs, all are equal, or all of one class.
    """
    seen = 0
    first: Batch | None = None
    varied = mixed = False
    for batch in workload.batches("calibration"):
        size = min(len(next(iter(batch.inputs.values()))), limit - seen)
        if size <= 0:
            break
        first = first or batch
        varied = varied or any(_differ(array[:size], first.inputs[name]) for name, array in batch.inputs.items())
        mixed = mixed or not _is_classes(batch.targets) or _differ(batch.targets[:size], first.targets)
        yield {name: array[:size] for name, array in batch.inputs.items()}
        seen += size
    where = f"{workload.name}: calibration"
    if seen < FEWEST:
        raise BadData(
            f"the workload has {seen} calibration samples, ranges need at least {FEWEST}",
            where=where,
            fix="give more calibration samples, some hundreds are usual; or use quantize.dynamic, which needs none",
        )
    if not varied:
        raise BadData(
            f"all {seen} calibration samples are equal",
            where=where,
            fix="give samples as they will be served; or use quantize.dynamic, which needs none",
        )
    if not mixed:
        raise BadData(
            f"all {seen} calibration samples are of one class",
            where=where,
            fix="shuffle them over all classes; if their targets are no classes, give Batch(inputs) without targets",
        )


def _differ(array: Array, reference: Array) -> bool:
    """Say whether a row of `array` differs from the first row of `reference`."""
    return array.shape[1:] != reference.shape[1:] or bool((array != reference[:1]).any())


def _is_classes(targets: object) -> bool:
    """Say whether the targets are one integer for each sample."""
    return isinstance(targets, np.ndarray) and targets.ndim == 1 and targets.dtype.kind in "iub"


def singly(batches: Iterator[dict[str, Array]]) -> Iterator[dict[str, Array]]:
    """Yield the samples one at a time: ONNX Runtime's histograms need every call to have the same shape.

    Raises:
        BadData: the samples differ in shape.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            sample = {name: array[row : row + 1] for name, array in batch.items()}
            for name, array in sample.items():
                if shapes.setdefault(name, array.shape) != array.shape:
                    raise BadData(
                        f"calibration samples of {name!r} have the shapes {shapes[name][1:]} and {array.shape[1:]}",
                        fix='pad them to one length, or use calibrator = "minmax"',
                    )
            yield sample


def reader(batches: Iterator[Arrays]) -> "CalibrationDataReader":
    """Return ONNX Runtime's reader over `batches`."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base class comes untyped
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else dict(batch)

    return Reader()
