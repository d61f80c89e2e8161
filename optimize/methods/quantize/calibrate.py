"""Calibration: the workload's calibration batches, read the way that ONNX Runtime's calibrators ask for them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import Field

from modelathe.tensors import Array, Arrays
from optimize.model.errors import BadData
from optimize.source import padding, sample
from optimize.source.batch import Batch
from optimize.source.workload import Workload

if TYPE_CHECKING:
    from onnxruntime.quantization import CalibrationDataReader

FEWEST = 8
"""Samples below which a range is an accident."""
SAMPLES: int = Field(default=256, ge=FEWEST, description="Calibration samples at most.")
"""The field `samples` of every method that takes ranges from calibration samples."""


def samples(workload: Workload, limit: int) -> Iterator[dict[str, Array]]:
    """Yield the inputs of `limit` calibration samples, drawn from all at random, without padding; one length a batch.

    Raises:
        BadData: a value is not finite, there are fewer samples than a range needs, all are equal, or all of one class.
    """
    yield from padding.stripped(workload, _checked(workload, limit))


def _checked(workload: Workload, limit: int) -> Iterator[Batch]:
    seen = 0
    first: Batch | None = None
    varied = mixed = False
    for batch in sample.rows(workload, "calibration", limit):
        first = first or batch
        varied = varied or any(_differ(array, first.inputs[name]) for name, array in batch.inputs.items())
        mixed = mixed or not _is_classes(batch.targets) or _differ(batch.targets, first.targets)
        yield batch
        seen += batch.size
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


def reader(batches: Iterable[Arrays]) -> "CalibrationDataReader":
    """Return ONNX Runtime's reader over `batches`, which it may also ask for one by one (`CalibStridedMinMax`)."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base class comes untyped
        def __init__(self) -> None:
            self._left = iter(batches)

        def __len__(self) -> int:
            return len(cast("Sequence[Arrays]", batches))

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(cast("Sequence[Arrays]", batches)[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else dict(batch)

    return Reader()
