"""Handwritten digits: a small CNN, trained on scikit-learn's real digits scaled to 28 x 28.

The trained weights stand beside this file as `digits_cnn.safetensors`; `python examples/digits_cnn.py` trains them
again in a minute or two.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, TensorSpec, Workload

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SEED = 0


class DigitsCNN(nn.Module):
    """Conv32 - Conv64 - Conv64 - Dense64 - Dense10; images float32 [n, 1, 28, 28] in [0, 1] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)
        self.dense1, self.dense2 = nn.Linear(576, 64), nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        # Pooling first leaves the ReLU a quarter of the work, and the outcome is the same.
        x = functional.max_pool2d(self.conv1(image), 2).relu()
        x = functional.max_pool2d(self.conv2(x).relu(), 2)
        x = self.conv3(x).relu().flatten(1)
        return self.dense2(self.dense1(x).relu())


def digits() -> tuple[Array, Array, Array, Array]:
    """Return training images, held-out images, training labels, held-out labels: 1,257 and 540 samples."""
    images, labels = load_digits(return_X_y=True)
    scaled = zoom(images.reshape(-1, 8, 8) / 16, (1, 3.5, 3.5), order=1).astype(np.float32)[:, None]
    return tuple(train_test_split(scaled, labels.astype(np.int64), test_size=540, random_state=SEED, stratify=labels))


def shuffled(images: Array, labels: Array, rng: np.random.Generator) -> Iterator[Batch]:
    """Yield one epoch in batches of 64, each image shifted by up to two pixels."""
    order = rng.permutation(len(images))
    for start in range(0, len(order) - 63, 64):
        index = order[start : start + 64]
        shift = tuple(int(pixels) for pixels in rng.integers(-2, 3, 2))
        yield Batch({"image": np.roll(images[index], shift, axis=(2, 3))}, labels[index])


def trained() -> DigitsCNN:
    """Return the model with its trained weights."""
    model = DigitsCNN()
    model.load_state_dict(load_file(WEIGHTS))
    return model


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of the logits."""
    return functional.cross_entropy(outputs["logits"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    """Judge each image: is the label right, and is it the label that the trained model gives?"""
    label = outputs["logits"].argmax(1)
    return {
        "accuracy": (label == targets).astype(np.float64),
        "agreement": (label == reference["logits"].argmax(1)).astype(np.float64),
    }


def workload() -> Workload:
    """Return the digits workload."""
    train_images, test_images, train_labels, test_labels = digits()
    rng = np.random.default_rng(SEED)

    def evaluation() -> Iterator[Batch]:
        for start in range(0, len(test_images), 60):
            yield Batch({"image": test_images[start : start + 60]}, test_labels[start : start + 60])

    def calibration() -> Iterator[Batch]:
        for start in range(0, 256, 32):
            yield Batch({"image": train_images[start : start + 32]})

    return Workload(
        name="digits_cnn",
        model=trained,
        inputs=(TensorSpec("image", "float32", (BATCH, 1, 28, 28)),),
        outputs=("logits",),
        evaluation=evaluation,
        calibration=calibration,
        training=lambda: shuffled(train_images, train_labels, rng),
        loss=loss,
        scores=scores,
        bounded=True,
    )


def train(epochs: int = 60) -> None:
    """Train the model from scratch and write its weights."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    train_images, test_images, train_labels, test_labels = digits()
    model = DigitsCNN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in shuffled(train_images, train_labels, rng):
            value = loss({"logits": model(torch.from_numpy(batch.inputs["image"]))}, torch.from_numpy(batch.targets))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
    with torch.inference_mode():
        accuracy = (model(torch.from_numpy(test_images)).argmax(1).numpy() == test_labels).mean()
    save_file(model.state_dict(), WEIGHTS)
    print(f"held-out accuracy {accuracy:.4f}, weights in {WEIGHTS}")


if __name__ == "__main__":
    train()
