"""A multilayer perceptron 784-128-64-10 on handwritten digits."""

from dataclasses import replace

import digits_cnn
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload


class MLP(nn.Module):
    """Images float32 [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.hidden2, self.out = nn.Linear(784, 128), nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.hidden1(image.flatten(1)).relu()
        return self.out(self.hidden2(x).relu())


def workload() -> Workload:
    """Return the workload `mlp`."""
    return learned(lambda: replace(digits_cnn.workload(), name="mlp", model=MLP), __file__, by_loss(epochs=60))


if __name__ == "__main__":
    again(workload())
