"""Losses: what a step trains by, by name, on a model's first output and the targets."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from optimize.model.errors import BadWorkload

Loss = Callable[[Mapping[str, torch.Tensor], Any], torch.Tensor]


def named(name: str) -> Loss:
    """Return the loss of that name: `cross_entropy`, `bce` (on logits), `mse` or `l1`.

    Raises:
        BadWorkload: there is no such loss.
    """
    known = {"cross_entropy": _cross_entropy, "bce": _bce, "mse": _mse, "l1": _l1}
    if name not in known:
        raise BadWorkload(f"there is no loss {name!r}", fix=f"use one of {', '.join(known)}, or a function")
    by_tensors = known[name]

    def loss(outputs: Mapping[str, torch.Tensor], targets: Any) -> torch.Tensor:
        first = next(iter(outputs.values()))
        return by_tensors(first, torch.as_tensor(targets, device=first.device))

    return loss


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape != (len(targets), *outputs.shape[2:]):
        outputs = outputs.movedim(-1, 1)  # labels for each token: torch wants the classes second
    whole = targets.shape == outputs.shape and outputs.ndim > 1  # a number for each class
    return functional.cross_entropy(outputs, targets.to(outputs.dtype) if whole else targets.long())


def _bce(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(outputs.reshape(targets.shape), targets.to(outputs.dtype))


def _mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(outputs.reshape(targets.shape), targets.to(outputs.dtype))


def _l1(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.l1_loss(outputs.reshape(targets.shape), targets.to(outputs.dtype))
