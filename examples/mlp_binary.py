"""A perceptron 2-10-1 with a sigmoid output, on scikit-learn's two moons: too small for anything to pay off."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import make_moons
from torch import nn
from torch.nn import functional
from trained import again, by_loss, learned

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, TensorSpec, Workload

SAMPLES, BATCH_SIZE = 2000, 100


class BinaryMLP(nn.Module):
    """Points float32 [n, 2] to the probability [n, 1] of the second moon."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2, 10), nn.Linear(10, 1)

    def forward(self, point: torch.Tensor) -> torch.Tensor:
        """Return the probability."""
        return self.out(self.hidden(point).relu()).sigmoid()


def moons(seed: int) -> Iterator[Batch]:
    """Yield points and their moon, 0 or 1, as float32 [n, 1]."""
    points, labels = make_moons(SAMPLES, noise=0.15, random_state=seed)
    for start in range(0, SAMPLES, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        yield Batch({"point": points[part].astype(np.float32)}, labels[part, None].astype(np.float32))


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy."""
    return functional.binary_cross_entropy(outputs["probability"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    """Judge each point: is it on the right side of one half?"""
    return {"accuracy": ((outputs["probability"] > 0.5) == (targets > 0.5))[:, 0].astype(np.float64)}


def untrained() -> Workload:
    """Return the workload without trained weights."""
    return Workload(
        name="mlp_binary",
        model=BinaryMLP,
        inputs=(TensorSpec("point", "float32", (BATCH, 2)),),
        outputs=("probability",),
        evaluation=lambda: moons(1),
        calibration=lambda: moons(2),
        training=lambda: moons(0),
        loss=loss,
        scores=scores,
        bounded=True,
    )


def workload() -> Workload:
    """Return the workload `mlp_binary`."""
    return learned(untrained, __file__, by_loss(epochs=60, learning_rate=2e-2))


if __name__ == "__main__":
    again(workload())
