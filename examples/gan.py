"""The generator of a conditional GAN for handwritten digits, in the shape of DCGAN (Radford et al., arXiv 1511.06434).

An image is judged by a fixed classifier, the trained model of digits_cnn.py: which probability does it give to the
digit that was asked for?
"""

from collections.abc import Iterator

import digits_cnn
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from trained import SEED, again, learned

from modelathe.tensors import Array, Arrays
from optimize import BATCH, Batch, TensorSpec, Workload

NOISE, BATCH_SIZE, SAMPLES, EPOCHS = 32, 64, 640, 40


class Generator(nn.Module):
    """Noise float32 [n, 32] and digits int64 [n, 1] to images float32 [n, 1, 28, 28] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Embedding(10, NOISE)
        self.dense, self.norm = nn.Linear(2 * NOISE, 128 * 49), nn.BatchNorm2d(128)
        self.lift1, self.norm1 = nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64)
        self.lift2 = nn.ConvTranspose2d(64, 1, 4, 2, 1)

    def forward(self, noise: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
        """Return images."""
        x = self.dense(torch.cat((noise, self.digit(digit[:, 0])), 1)).unflatten(1, (-1, 7, 7))
        x = self.norm1(self.lift1(self.norm(x).relu())).relu()
        return self.lift2(x).sigmoid()


class Discriminator(nn.Module):
    """Images float32 [n, 1, 28, 28] and digits int64 [n] to float32 [n]: positive where they look real together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 4, 2, 1)
        self.conv2 = nn.Conv2d(32, 64, 4, 2, 1)
        self.dense, self.digit = nn.Linear(64 * 49, 128), nn.Embedding(10, 128)
        self.out = nn.Linear(128, 1)

    def forward(self, image: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
        """Return the scores; the digit enters as a projection (Miyato and Koyama, arXiv 1802.05637)."""
        x = functional.leaky_relu(self.conv1(image), 0.2)
        x = functional.leaky_relu(self.conv2(x), 0.2).flatten(1)
        x = functional.leaky_relu(self.dense(x), 0.2)
        return self.out(x)[:, 0] + (x * self.digit(digit)).sum(1)


def adversarial(generator: nn.Module, workload: Workload) -> None:
    """Train the generator against a discriminator on the real digits, with the hinge loss."""
    judge = Discriminator()
    known, _, labels, _ = digits_cnn.digits()
    rng = np.random.default_rng(SEED)
    of_judge = torch.optim.Adam(judge.parameters(), lr=4e-4, betas=(0.5, 0.99))
    of_generator = torch.optim.Adam(generator.parameters(), lr=4e-4, betas=(0.5, 0.99))
    generator.train()
    for _ in range(EPOCHS):
        for batch in digits_cnn.shuffled(known, labels, rng):
            real, digit = torch.from_numpy(batch.inputs["image"]), torch.from_numpy(batch.targets)
            fake = generator(torch.randn(len(real), NOISE), digit[:, None])
            value = (1 - judge(real, digit)).relu().mean() + (1 + judge(fake.detach(), digit)).relu().mean()
            of_judge.zero_grad()
            value.backward()
            of_judge.step()
            value = -judge(fake, digit).mean()
            of_generator.zero_grad()
            value.backward()
            of_generator.step()
    generator.eval()


def asked(rng: np.random.Generator) -> Iterator[Batch]:
    """Yield noise and digits, and the digits as targets."""
    for _ in range(SAMPLES // BATCH_SIZE):
        digit = rng.integers(0, 10, BATCH_SIZE)
        noise = rng.standard_normal((BATCH_SIZE, NOISE)).astype(np.float32)
        yield Batch({"noise": noise, "digit": digit[:, None]}, digit)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    """Return the classifier's probability of each digit that was asked for, and the likeness to the trained image."""
    with torch.inference_mode():
        logits = digits_cnn.trained()(torch.from_numpy(np.ascontiguousarray(outputs["image"])))
        probability = logits.softmax(1).numpy()[np.arange(len(targets)), targets]
    error = np.abs(outputs["image"] - reference["image"]).mean((1, 2, 3))
    return {"asked_digit": probability.astype(np.float64), "likeness": 1 - error.astype(np.float64)}


def untrained() -> Workload:
    """Return the workload without trained weights, and without a loss: its students follow the trained generator."""
    rng = np.random.default_rng(SEED)
    return Workload(
        name="gan",
        model=Generator,
        inputs=(
            TensorSpec("noise", "float32", (BATCH, NOISE)),
            TensorSpec("digit", "int64", (BATCH, 1), values=(0, 9)),
        ),
        outputs=("image",),
        evaluation=lambda: asked(np.random.default_rng(1)),
        calibration=lambda: asked(np.random.default_rng(2)),
        training=lambda: asked(rng),
        scores=scores,
        bounded=True,
    )


def workload() -> Workload:
    """Return the workload `gan`."""
    return learned(untrained, __file__, adversarial)


if __name__ == "__main__":
    again(workload())
