"""A text CNN (Kim, arXiv 1408.5882) that tells which package a docstring comes from."""

import docstrings
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload

WIDTH, CHANNELS = 64, 128


class TextCNN(nn.Module):
    """Embedding - Conv1d - maximum over time - Dense; tokens int64 [n, 32] to logits [n, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(docstrings.VOCABULARY, WIDTH, padding_idx=docstrings.PAD)
        self.conv = nn.Conv1d(WIDTH, CHANNELS, 3, padding=1)
        self.dense = nn.Linear(CHANNELS, len(docstrings.PACKAGES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x = self.conv(self.embedding(tokens).transpose(1, 2)).relu()
        return self.dense(x.amax(2))


def workload() -> Workload:
    """Return the workload `text_cnn`."""
    return learned(lambda: docstrings.classification("text_cnn", TextCNN), __file__, by_loss(epochs=30))


if __name__ == "__main__":
    again(workload())
