"""A GRU that reads a handwritten digit row by row."""

from dataclasses import replace

import digits_cnn
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload

HIDDEN = 128


class RowGRU(nn.Module):
    """The rows of an image as a sequence of 28 steps; images float32 [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(28, HIDDEN, batch_first=True)
        self.dense = nn.Linear(HIDDEN, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        steps, _ = self.gru(image.squeeze(1))
        return self.dense(steps[:, -1])


def workload() -> Workload:
    """Return the workload `gru`."""
    return learned(
        lambda: replace(digits_cnn.workload(), name="gru", model=RowGRU),
        __file__,
        by_loss(epochs=30, learning_rate=5e-3),
    )


if __name__ == "__main__":
    again(workload())
