"""A small U-Net (Ronneberger et al., arXiv 1505.04597) that finds a handwritten digit in noise and clutter."""

from collections.abc import Iterator

import digits_cnn
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from trained import again, by_loss, learned

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, TensorSpec, Workload

WIDTHS = (32, 64, 128)
BATCH_SIZE, NOISE, BARS = 60, 0.2, 3


def convolved(inner: int, outer: int) -> nn.Sequential:
    """Return two convolutions with batch normalization; [n, inner, h, w] to [n, outer, h, w]."""
    layers: list[nn.Module] = []
    for channels in (inner, outer):
        layers += [nn.Conv2d(channels, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two poolings down and up again, with skip connections; images float32 [n, 1, 28, 28] to logits of that shape."""

    def __init__(self) -> None:
        super().__init__()
        small, middle, large = WIDTHS
        self.down1, self.down2, self.bottom = convolved(1, small), convolved(small, middle), convolved(middle, large)
        self.lift2, self.up2 = nn.ConvTranspose2d(large, middle, 2, 2), convolved(2 * middle, middle)
        self.lift1, self.up1 = nn.ConvTranspose2d(middle, small, 2, 2), convolved(2 * small, small)
        self.out = nn.Conv2d(small, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits of the mask."""
        first = self.down1(image)
        second = self.down2(functional.max_pool2d(first, 2))
        x = self.lift2(self.bottom(functional.max_pool2d(second, 2)))
        x = self.lift1(self.up2(torch.cat((x, second), 1)))
        return self.out(self.up1(torch.cat((x, first), 1)))


def scenes(digits: Array, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield digits under noise and bright bars as `image`, and where the digit is, 0 or 1, as targets."""
    for start in range(0, len(digits) - BATCH_SIZE + 1, BATCH_SIZE):
        digit = digits[start : start + BATCH_SIZE]
        image = digit + NOISE * rng.standard_normal(digit.shape)
        for scene in image[:, 0]:
            for row, column, length in zip(*rng.integers((0, 0, 5), (28, 28, 15), (BARS, 3)).T, strict=True):
                scene[row, column : column + length] += 0.7
        yield Batch({"image": image.astype(np.float32)}, (digit > 0.4).astype(np.float32))


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of the pixels."""
    return functional.binary_cross_entropy_with_logits(outputs["logits"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    """Return the intersection over union of each mask, with the digit's and with the trained model's."""
    mask = outputs["logits"] > 0
    return {"iou": _iou(mask, targets > 0), "agreement": _iou(mask, reference["logits"] > 0)}


def _iou(one: Array, other: Array) -> Array:
    axes = (1, 2, 3)
    together = (one | other).sum(axes)
    return np.where(together > 0, (one & other).sum(axes) / np.maximum(together, 1), 1.0)


def untrained() -> Workload:
    """Return the workload without trained weights."""
    known, held_out, _, _ = digits_cnn.digits()
    rng = np.random.default_rng(digits_cnn.SEED)

    def calibration() -> Iterator[Batch]:
        for batch in scenes(known[:240], np.random.default_rng(1)):
            yield Batch(batch.inputs)

    return Workload(
        name="unet",
        model=UNet,
        inputs=(TensorSpec("image", "float32", (BATCH, 1, 28, 28)),),
        outputs=("logits",),
        evaluation=lambda: scenes(held_out, np.random.default_rng(2)),
        calibration=calibration,
        training=lambda: scenes(rng.permutation(known), rng),
        loss=loss,
        scores=scores,
        bounded=True,
    )


def workload() -> Workload:
    """Return the workload `unet`."""
    return learned(untrained, __file__, by_loss(epochs=6, learning_rate=3e-3))


if __name__ == "__main__":
    again(workload())
