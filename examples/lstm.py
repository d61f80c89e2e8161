"""An LSTM text classifier that tells which package a docstring comes from."""

import docstrings
import torch
from torch import nn
from trained import again, by_loss, learned

from optimize import Workload


class TextLSTM(nn.Module):
    """Embedding 16 - LSTM 128 - LSTM 64 - maximum over time - Dense 64 - 8; tokens int64 [n, 32] to logits [n, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(docstrings.VOCABULARY, 16, padding_idx=docstrings.PAD)
        self.lstm1, self.lstm2 = nn.LSTM(16, 128, batch_first=True), nn.LSTM(128, 64, batch_first=True)
        self.dense, self.out = nn.Linear(64, 64), nn.Linear(64, len(docstrings.PACKAGES))
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        x, _ = self.lstm1(self.dropout(self.embedding(tokens)))
        x, _ = self.lstm2(self.dropout(x))
        return self.out(self.dropout(self.dense(x.amax(1)).relu()))


def workload() -> Workload:
    """Return the workload `lstm`."""
    return learned(
        lambda: docstrings.classification("lstm", TextLSTM), __file__, by_loss(epochs=40, learning_rate=1e-2)
    )


if __name__ == "__main__":
    again(workload())
