"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) on handwritten digits, cut into 16 patches."""

from dataclasses import replace

import digits_cnn
import torch
from torch import nn
from torch.nn import functional
from trained import again, by_loss, learned

from optimize import Workload

WIDTH, HEADS, DEPTH, PATCH = 128, 4, 3, 7


class Attention(nn.Module):
    """Self-attention among float32 [n, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mixed tokens, in the shape of `x`."""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a normalization and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.hidden, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens, in the shape of `x`."""
        x = x + self.attention(self.norm1(x))
        return x + self.out(functional.gelu(self.hidden(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 7 x 7 as tokens, and their mean; images float32 [n, 1, 28, 28] to logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (28 // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm, self.dense = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.dense(self.norm(x).mean(1))


def workload() -> Workload:
    """Return the workload `vit`."""
    return learned(
        lambda: replace(digits_cnn.workload(), name="vit", model=ViT), __file__, by_loss(epochs=30, learning_rate=1e-3)
    )


if __name__ == "__main__":
    again(workload())
