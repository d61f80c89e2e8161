"""What tests of users' modules share: one workload around any module, and its way through a bundle."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelathe.tensors import BATCH, Array, Arrays, TensorSpec
from optimize.methods.export.onnx import export
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle

WIDTH = 12
ROW = TensorSpec("x", "float32", (BATCH, WIDTH), (-1, 1))


class Net(nn.Module):
    """What the modules of the tests are variations of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(self.one(x).relu())
        return y


def likeness(outputs: Arrays, targets: object, reference: Arrays) -> dict[str, Array]:
    close = [
        np.isclose(outputs[name], wanted, atol=1e-3).reshape(len(wanted), -1) for name, wanted in reference.items()
    ]
    return {"likeness": np.concatenate(close, 1).mean(1)}


def brought(model: Callable[[], nn.Module], inputs: Sequence[TensorSpec] = (ROW,), batch: int = 8) -> Workload:
    """Return the workload of a module with the output y and random data."""

    def batches(seed: int) -> list[Batch]:
        rng = np.random.default_rng(seed)
        return [Batch({spec.name: spec.generate(rng, batch) for spec in inputs}) for _ in range(2)]

    return Workload(
        name="brought",
        model=model,
        inputs=tuple(inputs),
        outputs=("y",),
        evaluation=lambda: batches(1),
        calibration=lambda: batches(2),
        training=lambda: batches(3),
        scores=likeness,
        bounded=True,
        source=f"{__file__}:brought",
    )


def through_a_bundle(workload: Workload, folder: Path) -> tuple[Bundle, dict[str, Array]]:
    """Export the model, save and load it; return the bundle, and the answers: before, of its torch and ONNX forms."""
    module, arrays = workload.build(), workload.first()
    wanted = TorchPredictor(module, workload.outputs).predict(arrays)
    graph = export(module, workload.inputs, workload.outputs, folder / "model.onnx", real=arrays)
    bundles.save(Bundle(workload, module, graph), folder / "bundle")
    made = bundles.load(folder / "bundle", workload)
    assert made.graph is not None
    with OnnxPredictor(made.graph) as onnx:
        answers = {"torch": TorchPredictor(made.module, workload.outputs).predict(arrays), "onnx": onnx.predict(arrays)}
    return made, {"before": wanted["y"], **{name: found["y"] for name, found in answers.items()}}


def agree(answers: dict[str, Array]) -> None:
    """Fail unless the three answers of `through_a_bundle` are one."""
    np.testing.assert_allclose(answers["torch"], answers["before"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(answers["onnx"], answers["before"], rtol=1e-3, atol=1e-5)
