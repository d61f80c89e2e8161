"""Accuracy: MLPerf's accuracy mode. All samples are sent once, and what the model says is held against a reference."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelathe.errors import BadInput
from modelathe.tensors import Array, Arrays, TensorSpec

GATES = {"99%": 0.99, "99.9%": 0.999}
"""Shares of the reference's metric that MLPerf asks for, the second for the high-accuracy variants."""


@dataclass(frozen=True)
class Outcome:
    """How right a model is: its metric and that of the reference, both shares of the samples in [0, 1]."""

    name: str
    value: float
    reference: float
    samples: int

    @property
    def ratio(self) -> float:
        """The metric as a share of the reference's."""
        return self.value / self.reference if self.reference else float("nan")


def against_labels(classes: Array, labels: Array, reference: float) -> Outcome:
    """Return the share of right classes; both arrays have the shape [samples], `reference` is in (0, 1]."""
    return Outcome("top-1 accuracy", float((classes == labels).mean()), reference, len(labels))


def against_version(classes: Array, others: Array, labels: Array | None) -> Outcome:
    """Return the accuracy beside that of another version; without labels, how often the two say the same."""
    if labels is not None:
        return against_labels(classes, labels, float((others == labels).mean()))
    return Outcome("agreement with the reference version", float((classes == others).mean()), 1.0, len(classes))


def classes(
    infer: Callable[[Arrays], Arrays],
    samples: Sequence[Arrays],
    specs: Sequence[TensorSpec],
    batch: int,
    output: str = "",
) -> Array:
    """Send every sample once and return the classes that the model says, of shape [samples] and an integer dtype.

    Args:
        infer: asks the model.
        samples: one request's inputs each, of one sample.
        specs: of the inputs.
        batch: samples in one request.
        output: which output holds the classes or the scores of classes; the only or first one if empty.

    Raises:
        BadInput: the output is missing, or holds neither classes nor scores of several.
    """
    found = [_classes(infer(inputs), output, len(group)) for group, inputs in _requests(samples, specs, batch)]
    return np.concatenate(found)


def _requests(
    samples: Sequence[Arrays], specs: Sequence[TensorSpec], batch: int
) -> Iterator[tuple[Sequence[Arrays], Arrays]]:
    size = batch if all(spec.batched for spec in specs) else 1
    for at in range(0, len(samples), size):
        group = samples[at : at + size]
        if size == 1:
            yield group, group[0]
        else:
            yield group, {spec.name: np.concatenate([sample[spec.name] for sample in group]) for spec in specs}


def _classes(outputs: Arrays, name: str, count: int) -> Array:
    name = name or next(iter(outputs))
    if name not in outputs:
        raise BadInput(f"the model has no output {name!r}", fix=f"give --label-output as one of {', '.join(outputs)}")
    array = outputs[name]
    if array.shape[:1] != (count,):
        array = array[np.newaxis]  # a model without a batch axis answers one sample
    whole = array.dtype.kind in "iu"
    rows = array.reshape(count, -1)
    if rows.shape[1] == 1 and whole:
        return rows[:, 0].astype(np.int64)
    if rows.shape[1] == 1 or array.ndim > 2:
        raise BadInput(
            f"output {name} of shape {list(array.shape)} holds no classes",
            fix="name another with --label-output, or judge the model with `optimize evaluate`",
        )
    found: Array = rows.argmax(axis=1)
    return found


def read_labels(path: Path, samples: int) -> Array:
    """Return the right classes from a .npy file, of shape [samples].

    Raises:
        BadInput: no such file, not one whole number per sample.
    """
    fix = "write it with numpy.save, one whole number per sample"
    try:
        labels: Any = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=fix) from None
    except (ValueError, EOFError, OSError) as error:
        raise BadInput(f"is no .npy file: {error}", where=str(path), fix=fix) from error
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (samples,):
        shape = getattr(labels, "shape", "several arrays")
        raise BadInput(f"holds {shape} for {samples} samples", where=str(path), fix=fix)
    return labels


def document(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as values of JSON."""
    return {
        "metric": {"name": outcome.name, "value": outcome.value, "unit": ""},
        "reference": outcome.reference,
        "ratio": outcome.ratio,
        "gates": {name: outcome.ratio >= share for name, share in GATES.items()},
        "samples": outcome.samples,
    }
