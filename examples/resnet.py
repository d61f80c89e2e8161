"""A small ResNet-18 (He et al., arXiv 1512.03385) on handwritten digits: residuals and batch normalization."""

from dataclasses import replace

import digits_cnn
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload

WIDTHS = (32, 64, 128, 256)


class Block(nn.Module):
    """Two convolutions beside a shortcut; [n, inner, h, w] to [n, outer, h / stride, w / stride]."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        changed = inner != outer or stride != 1
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
            if changed
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways."""
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """Four stages of two blocks; images float32 [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        # Like the original, the first convolution makes the image smaller.
        self.stem, self.norm = nn.Conv2d(1, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0])
        blocks = []
        for inner, outer in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            blocks += [Block(inner, outer, 1 if outer == WIDTHS[0] else 2), Block(outer, outer, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.dense = nn.Linear(WIDTHS[-1], 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.blocks(self.norm(self.stem(image)).relu())
        return self.dense(x.mean((2, 3)))


def workload() -> Workload:
    """Return the workload `resnet`."""
    return learned(lambda: replace(digits_cnn.workload(), name="resnet", model=ResNet), __file__, by_loss(epochs=12))


if __name__ == "__main__":
    again(workload())
