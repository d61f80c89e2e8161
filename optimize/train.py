"""Train: the one training loop, for distillation, healing between cuts of a pruning schedule, and fake quantization."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from optimize.errors import BadModel, BadWorkload, NoEffect
from optimize.predict import forward
from optimize.workload import Workload, guarded

if TYPE_CHECKING:
    from optimize.step import Context

Tensors = Mapping[str, torch.Tensor]
Objective = Callable[[nn.Module, Tensors, Any], torch.Tensor]
"""`objective(module, inputs, targets)` returns the scalar to make small."""


def fit(
    module: nn.Module, context: "Context", objective: Objective, *, name: str, epochs: int, learning_rate: float
) -> nn.Module:
    """Train `module` in place on the workload's training batches and return it in evaluation mode.

    AdamW, its rate falling along a cosine from `learning_rate` to zero.

    Args:
        module: has at least one parameter that requires a gradient.
        context: its seed, workload and progress are used; `context.trained` is put into evaluation mode.
        objective: what to make small.
        name: of the method, for messages.
        epochs: passes over the training data.
        learning_rate: the peak.

    Raises:
        NoEffect: every parameter is frozen.
        BadModel: the objective stopped being finite.
    """
    if not trainable(module):
        raise NoEffect(
            f"{name}: every parameter is frozen", where=context.workload.name, fix="set requires_grad on some of them"
        )
    torch.manual_seed(context.seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))
    )
    context.trained.eval()
    module.train()
    for epoch in range(epochs):
        mean = _epoch(module, context.workload, objective, optimizer)
        if not math.isfinite(mean):
            raise BadModel(f"{name}: the loss became {mean} in epoch {epoch + 1}", fix="lower learning_rate")
        context.progress(f"{name}: epoch {epoch + 1}, loss {mean:.4f}", (epoch + 1) / epochs)
        schedule.step()
    return module.eval()


def trainable(module: nn.Module) -> list[str]:
    """Return the names of the parameters that training could change."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def label_loss(workload: Workload, outputs: Tensors, targets: Any) -> torch.Tensor:
    """Return the workload's own loss.

    Raises:
        BadWorkload: the user's function raised, or returned something else than a scalar made from the outputs.
    """
    assert workload.loss is not None
    given = workload.loss
    value = guarded(lambda: given(outputs, targets), "loss()", workload.source)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise BadWorkload(
            f"loss() returned {shape}", where=workload.source, fix="return a scalar tensor made from the outputs"
        )
    return value.reshape(())


def healing(context: "Context") -> Objective:
    """Return the objective for a model that was cut: the workload's loss where it has one, else the trained model.

    Without a loss the outputs are drawn towards the trained model's, each scaled by the variance of the latter.
    """
    workload = context.workload

    def by_labels(module: nn.Module, inputs: Tensors, targets: Any) -> torch.Tensor:
        return label_loss(workload, forward(module, inputs, workload.outputs), targets)

    def by_outputs(module: nn.Module, inputs: Tensors, _targets: Any) -> torch.Tensor:
        with torch.no_grad():
            wanted = forward(context.trained, inputs, workload.outputs)
        given = forward(module, inputs, workload.outputs)
        parts = [
            ((given[name] - value) ** 2).mean() / value.var(correction=0).clamp(min=1e-12)
            for name, value in wanted.items()
            if value.is_floating_point()
        ]
        return torch.stack(parts).sum()

    return by_labels if workload.loss is not None else by_outputs


def _epoch(module: nn.Module, workload: Workload, objective: Objective, optimizer: torch.optim.Optimizer) -> float:
    total, count = 0.0, 0
    for inputs, targets in tensors(workload):
        value = objective(module, inputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        total, count = total + value.item(), count + 1
    return total / count


def tensors(workload: Workload, kind: str = "training") -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """Yield the inputs of one epoch as tensors by name, and the targets: a tensor, or what else the batch holds."""
    for batch in workload.batches(kind):
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.inputs.items()}
        targets = torch.from_numpy(batch.targets) if isinstance(batch.targets, np.ndarray) else batch.targets
        yield inputs, targets
