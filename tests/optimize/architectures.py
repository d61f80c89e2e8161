"""Workloads of four architectures, tiny and untrained, on which every method is tried beside the encoder."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

CLASSES = 4


class Convolutional(nn.Module):
    """A residual block, a convolution in groups and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.grouped, self.depthwise = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, groups=16)
        self.hidden, self.out = nn.Linear(16, 64), nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.two(self.one(x).relu())
        return self.out(self.hidden(self.depthwise(self.grouped(x).relu()).relu().mean((2, 3))).relu())


class Recurrent(nn.Module):
    """Two layers of an LSTM over steps of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 16, 2, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class TwoInputs(nn.Module):
    """Whole numbers that are looked up, and bools."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.flagged = nn.Embedding(200, 32), nn.Linear(6, 32)
        self.hidden, self.out = nn.Linear(32, 64), nn.Linear(64, CLASSES)

    def forward(self, ids: torch.Tensor, flags: torch.Tensor) -> torch.Tensor:
        x = self.table(ids).mean(1) + self.flagged(flags.float())
        return self.out(self.hidden(x.relu()).relu())


class Shared(nn.Module):
    """One layer that is called twice, and one weight that two layers have."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.twice = nn.Linear(12, 32), nn.Linear(32, 32)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(self.into(x).relu()).relu())
        return self.out(self.second(self.first(x.relu()).relu()).relu())


ROW = (TensorSpec("x", "float32", (BATCH, 12)),)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[TensorSpec, ...]]] = {
    "cnn": (Convolutional, (TensorSpec("x", "float32", (BATCH, 3, 8, 8)),)),
    "lstm": (Recurrent, (TensorSpec("x", "float32", (BATCH, Dim("steps", 2, 5, 20), 8)),)),
    "inputs": (
        TwoInputs,
        (TensorSpec("ids", "int64", (BATCH, 5), values=(0, 199)), TensorSpec("flags", "bool", (BATCH, 6))),
    ),
    "shared": (Shared, ROW),
}


def loss(outputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs["logits"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    return {"agreement": (outputs["logits"].argmax(1) == reference["logits"].argmax(1)).astype(float)}


def workload(name: str) -> Workload:
    """Return the workload of this name; its sets share no sample."""
    build, specs = KINDS[name]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return build()

    def batches(seed: int) -> Callable[[], list[Batch]]:
        def made() -> list[Batch]:
            rng = np.random.default_rng(seed)
            return [
                Batch({spec.name: spec.generate(rng, 16) for spec in specs}, rng.integers(0, CLASSES, 16))
                for _ in range(2)
            ]

        return made

    return Workload(
        *(name, model, specs, ("logits",), batches(0), scores, batches(1), batches(2)), loss=loss, bounded=True
    )
