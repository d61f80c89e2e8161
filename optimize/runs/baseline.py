"""Baseline: the trained model as the user brought it, exported to FP32 ONNX. All ratios and losses are against it."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from modelathe.tensors import Arrays
from optimize.judge import macs, measure
from optimize.judge.evaluate import Quality, evaluate
from optimize.judge.measure import Cost
from optimize.methods.export.onnx import export
from optimize.model.errors import BadBundle
from optimize.predict.module import TorchPredictor
from optimize.runs.folder import resume
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.key import Key
from serve.repository import scratch

Progress = Callable[[str, float], None]
EVERY = 5.0
"""Seconds between two words on how far something is."""


def silent(_text: str, _fraction: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Trained:
    """The trained model: its bundle with the FP32 ONNX, its quality and its cost (speed not yet measured)."""

    bundle: Bundle
    quality: Quality
    cost: Cost

    @property
    def reference(self) -> Arrays:
        """The outputs that every score may compare with."""
        return self.quality.outputs


def counting(progress: Progress, text: str, things: str, whole: float) -> Callable[[float], None]:
    """Say that something begins, and return what says every few seconds how many of a whole are done.

    Args:
        progress: is told.
        text: what begins.
        things: what is counted.
        whole: how many there are; 0 where that is not known.
    """
    progress(text, 0.0)
    said = time.monotonic()

    def told(done: float) -> None:
        nonlocal said
        if 0 < done < whole and time.monotonic() - said >= EVERY:
            said = time.monotonic()
            progress(f"{text}: {done:,.0f} of {whole:,.0f} {things}", done / whole)

    return told


def establish(
    workload: Workload,
    folder: Path,
    key: Key,
    progress: Progress = silent,
    runs: Path | None = None,
    samples: int = 0,
) -> Trained:
    """Return the trained model with its FP32 ONNX in `folder`, made there unless one of that key is found.

    Args:
        workload: what the user brought.
        folder: as for `reusable`, and so are `key`, `progress` and `runs`.
        key: of the bundle.
        progress: called with a text and the fraction of what it says.
        runs: where else it may lie.
        samples: of the evaluation set; 0 where nobody has counted.
    """
    for line in workload.inferred:
        progress(f"read from the data: {line}", 0.0)
    made = reusable(folder, workload, key, progress, runs)
    if made is None:
        progress("exporting the trained model", 0.0)
        with scratch.folder() as place:
            module = workload.build()
            graph = export(module, workload.inputs, workload.outputs, place / bundles.GRAPH, real=workload.first())
            made = bundles.save(Bundle(workload, module, graph), folder, key)
    told = counting(progress, "evaluating the trained model", "samples", samples)
    quality = evaluate(TorchPredictor(made.module, workload.outputs), workload, told=told)
    return Trained(made, quality, cost(made))


def again(trained: Trained, folder: Path, progress: Progress = silent) -> Trained:
    """Return the trained model with a bundle in `folder` too; what this process found out about it still holds.

    Args:
        trained: as it was established for another run.
        folder: as for `reusable`.
        progress: as for `reusable`.
    """
    key = trained.bundle.key
    made = reusable(folder, trained.bundle.workload, key, progress)
    return replace(trained, bundle=made or bundles.save(trained.bundle, folder, key))


def reusable(
    folder: Path, workload: Workload, key: Key, progress: Progress = silent, runs: Path | None = None
) -> Bundle | None:
    """Return the bundle in `folder` if its key is `key`; any other is removed, with a word why, and None.

    Args:
        folder: where it is or will be.
        workload: whose bundle it is.
        key: what it has to be made from.
        progress: told why it is made again.
        runs: where there is none, one of that key is copied from the runs in this folder.
    """
    if not folder.exists():
        if runs is None or (other := resume.borrow(folder, key, runs)) is None:
            return None
        progress(f"{folder.name} is copied from {other}", 0.0)
    try:
        if differs := Key(bundles.describe(folder)["made_of"]).changed(key):
            raise BadBundle(f"changed since it was made: {differs}", where=str(folder), fix="it is made again")
        return bundles.load(folder, workload)
    except BadBundle as error:
        progress(f"{folder.name} is made again: {error.what}", 0.0)
        shutil.rmtree(folder)
        return None


def cost(made: Bundle) -> Cost:
    """Return what can be counted of a bundle; the times are empty."""
    return Cost(
        measure.file_bytes(graph_of(made)),
        measure.parameters(made.module),
        macs.total(made.module, made.workload.inputs),
        {},
        {},
    )


def graph_of(made: Bundle) -> Path:
    """Return the ONNX file of a bundle that a step or the baseline saved; those always have one."""
    assert made.graph is not None
    return made.graph
