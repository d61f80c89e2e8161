"""Speed of a run: every step's ONNX file timed in the same rounds as the trained one's, and what that says of each."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelathe.tensors import TensorSpec
from optimize.judge import measure
from optimize.judge.explain import Stage
from optimize.judge.measure import Cost
from optimize.judge.ruler import CONTROL, Speeds, Until
from optimize.machine import doctor
from serve.config.target import Target

PATIENCE = 100.0
"""Seconds more than usual that a promise of speed may take until it is decided."""
HASTE = 20.0
"""The same, where another recipe is tried if it is not."""
TRAINED = "trained"


@dataclass(frozen=True)
class Timing:
    """The trained model and what the steps made of it, timed together.

    Args:
        files: ONNX files in their order, the trained model's under `TRAINED` first. A file may stand there twice.
        labels: what a person calls each.
        speeds: all of them, by the names of `files`; of no batch size where they were not measured.
        unmeasured: why they were not; empty where they were.
    """

    files: Mapping[str, Path]
    labels: Sequence[str]
    speeds: Speeds
    unmeasured: str = ""

    @property
    def result(self) -> str:
        """The name of the last one."""
        return list(self.files)[-1]

    def stages(self) -> list[Stage]:
        """Return each with its change of speed against the one before, from the same rounds."""
        names = list(self.files)
        changes = [self.speeds.ratios(name, before) for before, name in itertools.pairwise(names)]
        return [
            Stage(label, self.files[name], self.speeds.latency_ms(name), change)
            for name, label, change in zip(names, self.labels, [{}, *changes], strict=True)
        ]

    def cost(self, counted: Cost, name: str) -> Cost:
        """Return what was counted of a model with its times."""
        return replace(counted, latency_ms=self.speeds.latency_ms(name), throughput=self.speeds.throughput(name))

    def ratios(self, name: str) -> dict[str, Any]:
        """Return `{size, latency{}, throughput{}, interval{}, verdict{}, before{}, control{}, rounds, unmeasured}`.

        Larger is better. All but `before` are against the trained FP32 ONNX in ONNX Runtime, whatever runtime the
        target names for the result; `before` is against the step before, and `control` is the trained model against
        itself. The keys of the inner ones are batch sizes; each value of the last two is a whole ratio.
        """
        reached = {str(batch): ratio.document() for batch, ratio in self.speeds.ratios(name, TRAINED).items()}
        values = {batch: ratio["value"] for batch, ratio in reached.items()}
        before = self.stages()[list(self.files).index(name)].change
        return {
            "size": measure.file_bytes(self.files[TRAINED]) / measure.file_bytes(self.files[name]),
            "latency": values,
            "throughput": values,
            "interval": {batch: [ratio["low"], ratio["high"]] for batch, ratio in reached.items()},
            "verdict": {batch: ratio["verdict"] for batch, ratio in reached.items()},
            "before": {str(batch): ratio.document() for batch, ratio in before.items()},
            "control": {str(batch): ratio.document() for batch, ratio in self.speeds.control().items()},
            "rounds": self.speeds.rounds,
            "unmeasured": self.unmeasured,
        }


def lacking(target: Target) -> str:
    """Return why speed is not measured here: there is no GPU. One that does not work is an error, not an excuse."""
    return "not measured: no GPU here" if target.device == "cuda" and not doctor.has_gpu() else ""


def time(
    files: Mapping[str, Path], labels: Sequence[str], inputs: Sequence[TensorSpec], target: Target, patience: float
) -> Timing:
    """Time all files in the same rounds, until it is decided whether the last one is slower than the first.

    A target on a GPU is not measured where there is none.

    Args:
        files: as for `Timing`.
        labels: as for `Timing`.
        inputs: what is fed.
        target: gives the runtime, the device, the cores and the batch sizes.
        patience: seconds more than usual until the verdict.

    Raises:
        BadGraph: the runtime cannot load or run one of the files.
    """
    names = list(files)
    if unmeasured := lacking(target):
        nothing: dict[str, dict[int, list[float]]] = {name: {} for name in (*names, CONTROL)}
        return Timing(files, labels, Speeds(nothing, TRAINED, 0.0), unmeasured)
    pairs = [*((name, before) for before, name in itertools.pairwise(names)), (names[-1], TRAINED)]
    until = Until(pairs=pairs, decide=names[-1:], patience=patience)
    speeds = measure.speed(files, inputs, target, baseline=TRAINED, until=until)
    return Timing(files, labels, speeds)
