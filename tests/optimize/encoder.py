"""A workload of generated token sequences for methods that need a transformer: which of four kinds of token is the most
frequent. Token 0 is padding; the encoder is torch's own, two layers of four heads and width 32, trained in a second.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize.source.batch import Batch
from optimize.source.workload import Workload

CLASSES, VOCABULARY, LONGEST = 4, 20, 12
TRAIN, TEST = slice(0, 1024), slice(1024, 1280)


@functools.cache
def data() -> tuple[Array, Array]:
    """Rows of 6 to 12 tokens that are drawn from one kind more often than from the others, and that kind."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 1280)
    kinds = np.where(rng.random((1280, LONGEST)) < 0.6, labels[:, None], rng.integers(0, CLASSES, (1280, LONGEST)))
    tokens = 1 + kinds + CLASSES * rng.integers(0, 4, (1280, LONGEST))
    tokens[np.arange(LONGEST) >= rng.integers(6, LONGEST + 1, 1280)[:, None]] = 0
    return tokens, labels


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        padding = tokens == 0
        x = self.encoder(self.tokens(tokens), src_key_padding_mask=padding)
        return self.out(x.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def model() -> nn.Module:
    encoder = Encoder()
    encoder.load_state_dict(weights())
    return encoder


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    encoder = Encoder()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.003)
    for batch in [*batches(TRAIN), *batches(TRAIN)]:
        optimizer.zero_grad()
        logits = encoder(torch.from_numpy(batch.inputs["tokens"]))
        functional.cross_entropy(logits, torch.from_numpy(batch.targets)).backward()
        optimizer.step()
    return encoder.state_dict()


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs["logits"], targets)


def scores(outputs: Arrays, targets: Array, reference: Arrays) -> dict[str, Array]:
    return {"accuracy": (outputs["logits"].argmax(1) == targets).astype(float)}


def batches(part: slice, size: int = 64) -> Iterator[Batch]:
    tokens, labels = data()[0][part], data()[1][part]
    for start in range(0, len(tokens), size):
        yield Batch({"tokens": tokens[start : start + size]}, labels[start : start + size])


def workload() -> Workload:
    return Workload(
        name="encoder",
        model=model,
        inputs=(TensorSpec("tokens", "int64", (BATCH, Dim("length", 2, LONGEST, 64)), values=(1, VOCABULARY - 1)),),
        outputs=("logits",),
        evaluation=lambda: batches(TEST),
        calibration=lambda: batches(slice(0, 256)),
        training=lambda: batches(TRAIN),
        loss=loss,
        scores=scores,
        bounded=True,
    )
