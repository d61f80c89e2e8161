"""Ensure: what every step owes after it ran, and the private copy that it gets to work on."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from modelathe.tensors import Array
from optimize.model import copies
from optimize.model.errors import BadGraph, BadModel
from optimize.predict.module import TorchPredictor
from optimize.predict.runtimes import GraphPredictor, open_graph
from optimize.source.workload import Workload, fewest
from serve.config.target import Target


def copy(subject: Any, scratch: Path) -> Any:
    """Return a deep copy of a module, or a copy in `scratch` of an ONNX file and of the weights beside it."""
    if not isinstance(subject, Path):
        return copies.copied(subject)
    for file in sorted(subject.parent.glob(f"{subject.name}*")):
        shutil.copyfile(file, scratch / file.name)
    return scratch / subject.name


def still_works(subject: Any, workload: Workload, name: str, target: Target) -> None:
    """Run the first evaluation batch, whole and its first sample alone, through what the step `name` returned.

    A graph runs in the target's runtime. Where the workload declares no single samples, the fewest stand for one.

    Raises:
        BadModel: the module does not run, or its outputs are not those that the workload's own model has.
        BadGraph: the same of an ONNX file.
    """
    batch, few = workload.first(), fewest(workload.inputs)
    refused = BadGraph if isinstance(subject, Path) else BadModel
    reference = TorchPredictor(workload.build(), workload.outputs).predict(batch)
    try:
        with _predictor(subject, workload, target) as predictor:
            together = predictor.predict(batch)
            alone = predictor.predict({key: array[:few] for key, array in batch.items()})
    except (BadGraph, BadModel) as error:
        raise type(error)(
            f"after {name}: {error.what}", where=workload.name, fix=f"{_way_out(name)}; or {error.fix}"
        ) from error
    if set(together) != set(workload.outputs):
        raise refused(
            f"after {name} it returns {sorted(together)}, the workload declares {list(workload.outputs)}",
            where=workload.name,
            fix=_way_out(name),
        )
    for output, wanted in reference.items():
        for got, right in ((together[output], wanted), (alone[output], wanted[:few])):
            if fault := _fault(got, right):
                raise refused(f"after {name}, output {output!r} {fault}", where=workload.name, fix=_way_out(name))


def _predictor(subject: Any, workload: Workload, target: Target) -> GraphPredictor | TorchPredictor:
    return open_graph(subject, target) if isinstance(subject, Path) else TorchPredictor(subject, workload.outputs)


def _way_out(name: str) -> str:
    return f"leave {name} out, let it exclude the layers that this comes from, or change its other options"


def _fault(got: Array, wanted: Array) -> str:
    """Return what is wrong with an output; empty when nothing is."""
    if got.shape != wanted.shape:
        return f"has the shape {got.shape}, the trained model's has {wanted.shape}"
    if got.dtype != wanted.dtype:
        return f"is {got.dtype}, the trained model's is {wanted.dtype}"
    if got.dtype.kind == "f" and (np.isnan(got) & ~np.isnan(wanted) | np.isinf(got) & np.isfinite(wanted)).any():
        return "has values that are NaN or infinite where the trained model's are not"
    return ""
