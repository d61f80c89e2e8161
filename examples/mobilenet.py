"""A small MobileNet (Howard et al., arXiv 1704.04861) on handwritten digits: depthwise convolutions and ReLU6."""

from dataclasses import replace

import digits_cnn
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload

STAGES = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))


def normalized(conv: nn.Conv2d) -> nn.Sequential:
    """Return a convolution with batch normalization and ReLU6 after it."""
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU6())


class MobileNet(nn.Module):
    """Five depthwise separable convolutions; images float32 [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers = [normalized(nn.Conv2d(1, 32, 3, 2, 1, bias=False))]
        for inner, outer, stride in STAGES:
            layers.append(normalized(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)))
            layers.append(normalized(nn.Conv2d(inner, outer, 1, bias=False)))
        self.layers = nn.Sequential(*layers)
        self.dense = nn.Linear(STAGES[-1][1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.dense(self.layers(image).mean((2, 3)))


def workload() -> Workload:
    """Return the workload `mobilenet`."""
    return learned(
        lambda: replace(digits_cnn.workload(), name="mobilenet", model=MobileNet), __file__, by_loss(epochs=15)
    )


if __name__ == "__main__":
    again(workload())
