"""Checkpoint: where a training stands after an epoch, so that a killed run goes on from there."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelathe import files
from optimize.step.contract import fingerprint
from optimize.train import processes


class Checkpoint:
    """The one file of a training: weights, optimizer, and how far it has come.

    Random numbers need no place in it: training seeds them anew for every epoch.

    Args:
        folder: of one step with one config; None where nothing is kept.
        module: as it is before the training. A training that starts from other weights gets another file.
        optimizer: of its parameters.

    Attributes:
        batches: how many the last epoch had; 0 before the first.
    """

    def __init__(self, folder: Path | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._module, self._optimizer = module, optimizer
        self.batches = 0
        self._file = folder / f"{fingerprint(module)[:16]}.pt" if folder else None

    def load(self) -> int:
        """Restore what was saved last, and return how many epochs are done: 0 where nothing fit was saved."""
        if self._file is None or not self._file.is_file():
            return 0
        try:
            saved: dict[str, Any] = torch.load(self._file, map_location=processes.device(), weights_only=True)
        except Exception:  # torch's readers raise what they like; a damaged file is one that was not saved
            return 0
        self._module.load_state_dict(saved["module"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.batches = saved["batches"]
        return int(saved["epochs"])

    def save(self, epochs: int) -> None:
        """Write the state after so many epochs, whole or not at all."""
        if self._file is None or processes.rank():
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with files.writing(self._file) as stream:
            torch.save(
                {
                    "module": self._module.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "epochs": epochs,
                    "batches": self.batches,
                },
                stream,
            )
