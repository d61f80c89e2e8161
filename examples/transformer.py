"""A Transformer encoder (Vaswani et al., arXiv 1706.03762) that tells which package a docstring comes from."""

from dataclasses import replace

import docstrings
import torch
from torch import nn
from torch.nn import functional
from trained import again, by_loss, learned

from modelathe.tensors import Array, Arrays
from optimize import Workload

WIDTH, HEADS, LAYERS, HIDDEN = 512, 8, 2, 1024


class TextTransformer(nn.Module):
    """Two encoder layers and a sigmoid for each package; tokens int64 [n, 32] to float32 [n, 8], twice.

    Returns the probability of each package for itself, and the logits behind them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(docstrings.VOCABULARY, WIDTH, padding_idx=docstrings.PAD)
        self.position = nn.Parameter(0.02 * torch.randn(1, docstrings.WORDS, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, len(docstrings.PACKAGES))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probabilities and logits."""
        padding = tokens == docstrings.PAD
        x = self.encoder(self.embedding(tokens) + self.position, src_key_padding_mask=padding)
        words = (~padding).unsqueeze(-1).to(x.dtype)
        logits = self.out((x * words).sum(1) / words.sum(1).clamp(min=1))
        return logits.sigmoid(), logits


def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of every package."""
    wanted = functional.one_hot(targets, len(docstrings.PACKAGES)).float()
    return functional.binary_cross_entropy_with_logits(outputs["logits"], wanted)


def words(inputs: Arrays) -> Array:
    """Return which positions hold a word and no padding, bool [n, 32]."""
    found: Array = inputs["tokens"] != docstrings.PAD
    return found


def untrained() -> Workload:
    """Return the workload without trained weights."""
    made = docstrings.classification("transformer", TextTransformer, "probability")
    return replace(made, outputs=("probability", "logits"), loss=loss, mask=words)


def workload() -> Workload:
    """Return the workload `transformer`."""
    return learned(untrained, __file__, by_loss(epochs=6, learning_rate=3e-4))


if __name__ == "__main__":
    again(workload())
