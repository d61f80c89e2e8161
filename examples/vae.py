"""A variational autoencoder (Kingma and Welling, arXiv 1312.6114) of handwritten digits, judged on reconstruction."""

from collections.abc import Iterator
from dataclasses import replace

import digits_cnn
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from trained import again, by_loss, learned

from modelathe.tensors import Array, Arrays
from optimize import Batch, Workload

HIDDEN, LATENT, KL_WEIGHT = 512, 32, 0.1


class VAE(nn.Module):
    """Images float32 [n, 1, 28, 28] to their reconstruction, and to mean and log variance float32 [n, 32].

    In evaluation mode the mean itself is decoded, so that the same image gives the same answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encode1, self.encode2 = nn.Linear(784, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mean, self.log_variance = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.decode1, self.decode2 = nn.Linear(LATENT, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.pixels = nn.Linear(HIDDEN, 784)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return reconstruction, mean and log variance."""
        x = self.encode2(self.encode1(image.flatten(1)).relu()).relu()
        mean, log_variance = self.mean(x), self.log_variance(x)
        latent = mean
        if self.training:
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        y = self.decode2(self.decode1(latent).relu()).relu()
        return self.pixels(y).sigmoid().unflatten(1, (1, 28, 28)), mean, log_variance


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the negative evidence lower bound of an image: reconstruction, and weighted divergence from the prior."""
    mean, log_variance = outputs["mean"], outputs["log_variance"]
    error = functional.binary_cross_entropy(outputs["reconstruction"], targets, reduction="sum")
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
    return (error + KL_WEIGHT * divergence) / len(targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    """Return the explained share of each image: one minus squared error over the image's own variation, at least 0."""
    error = ((outputs["reconstruction"] - targets) ** 2).sum((1, 2, 3))
    variation = ((targets - targets.mean((1, 2, 3), keepdims=True)) ** 2).sum((1, 2, 3))
    return {"explained": np.clip(1 - error / variation, 0, 1).astype(np.float64)}


def untrained() -> Workload:
    """Return the workload without trained weights."""
    digits = digits_cnn.workload()

    def with_itself(kind: str) -> Iterator[Batch]:
        for batch in digits.batches(kind):
            # Interpolation leaves values a rounding error above one.
            image = np.clip(batch.inputs["image"], 0, 1)
            yield Batch({"image": image}, image)

    return replace(
        digits,
        name="vae",
        model=VAE,
        outputs=("reconstruction", "mean", "log_variance"),
        evaluation=lambda: with_itself("evaluation"),
        calibration=lambda: with_itself("calibration"),
        training=lambda: with_itself("training"),
        loss=loss,
        scores=scores,
    )


def workload() -> Workload:
    """Return the workload `vae`."""
    return learned(untrained, __file__, by_loss(epochs=60))


if __name__ == "__main__":
    again(workload())
