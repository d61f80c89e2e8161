"""A workload as a user would write it, trained in well under a second: scikit-learn's 8 x 8 digits and a small CNN.

Its wide dense layers are large enough for INT8 to be faster than FP32, which the gates demand.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, Arrays, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
TRAIN, TEST = slice(0, 1400), slice(1400, 1797)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.hidden, self.wide, self.out = nn.Linear(144, 768), nn.Linear(768, 768), nn.Linear(768, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.norm(self.conv(image)).relu(), 2)
        return self.out(self.wide(self.hidden(x.flatten(1)).relu()).relu())


def model() -> nn.Module:
    torch.manual_seed(0)
    small = Small()
    small.load_state_dict(weights())
    return small


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    small = Small()
    optimizer = torch.optim.Adam(small.parameters(), lr=0.002)
    images, labels = torch.from_numpy(IMAGES[TRAIN]), torch.from_numpy(LABELS[TRAIN])
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(small(images), labels).backward()
        optimizer.step()
    return small.state_dict()


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs["logits"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    right = outputs["logits"].argmax(1) == targets
    return {"accuracy": right.astype(float), "agreement": outputs["logits"].argmax(1) == reference["logits"].argmax(1)}


def batches(part: slice, size: int = 64) -> Iterator[Batch]:
    images, labels = IMAGES[part], LABELS[part]
    for start in range(0, len(images), size):
        yield Batch({"image": images[start : start + size]}, labels[start : start + size])


def workload() -> Workload:
    return Workload(
        name="small",
        model=model,
        inputs=(TensorSpec("image", "float32", (BATCH, 1, 8, 8)),),
        outputs=("logits",),
        evaluation=lambda: batches(TEST),
        calibration=lambda: batches(slice(0, 256)),
        training=lambda: batches(TRAIN),
        loss=loss,
        scores=scores,
        bounded=True,
    )
