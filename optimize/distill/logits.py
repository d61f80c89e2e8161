"""Logit distillation: the student learns the trained model's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): the Kullback–Leibler
divergence between both models' softmax at temperature T, times T² so that its gradient keeps its size as T grows,
mixed with the workload's own loss on the labels where a weight for it is given.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.errors import BadModel, BadWorkload, NoEffect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step import Context
    from optimize.workload import Workload


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Logits:
    """Train the model to give the trained model's class probabilities."""

    epochs: int = Field(default=4, ge=1, description="Passes over the training data.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak rate of AdamW; it falls along a cosine.")
    temperature: float = Field(default=4.0, gt=0, description="Softens both models' probabilities.")
    label_weight: float = Field(default=0.0, ge=0, le=1, description="Share of the workload's own loss on the labels.")
    logits: str = Field(default="", description="The output that holds the logits; the first one unless named.")


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the parameters that training could change."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def loss(student: "torch.Tensor", teacher: "torch.Tensor", temperature: float) -> "torch.Tensor":
    """Return the distillation loss of logits of shape [n, …, classes], a scalar averaged over all but the last dim."""
    from torch.nn import functional

    classes = student.shape[-1]
    divergence = functional.kl_div(
        functional.log_softmax(student.reshape(-1, classes) / temperature, dim=-1),
        functional.log_softmax(teacher.reshape(-1, classes) / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def apply(config: Logits, module: "nn.Module", context: "Context") -> "nn.Module":
    """Train `module` in place against `context.trained` and return it in evaluation mode.

    Raises:
        BadWorkload: a label weight without a loss, or an output that the workload does not have.
        BadModel: the loss stopped being finite.
    """
    import torch

    workload = context.workload
    output = config.logits or workload.outputs[0]
    if output not in workload.outputs:
        raise BadWorkload(
            f"distill.logits: there is no output {output!r}", fix=f"outputs: {', '.join(workload.outputs)}"
        )
    if config.label_weight and workload.loss is None:
        raise BadWorkload(
            "distill.logits: label_weight needs the workload's loss", fix="give a loss, or label_weight = 0"
        )
    if not matches(module):
        raise NoEffect(
            "distill.logits: every parameter is frozen", where=workload.name, fix="set requires_grad on some of them"
        )
    torch.manual_seed(context.seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch, config.epochs) / config.epochs))
    )
    context.trained.eval()
    module.train()
    for epoch in range(config.epochs):
        mean = _epoch(config, output, module, optimizer, context)
        if not math.isfinite(mean):
            raise BadModel(
                f"distill.logits: the loss became {mean} in epoch {epoch + 1}", fix="lower learning_rate or temperature"
            )
        context.progress(f"distill.logits: epoch {epoch + 1}, loss {mean:.4f}", (epoch + 1) / config.epochs)
        schedule.step()
    return module.eval()


def _epoch(config: Logits, output: str, module: "nn.Module", optimizer: Any, context: "Context") -> float:
    import torch

    from optimize.predict import forward

    workload, total, count = context.workload, 0.0, 0
    for inputs, targets in _tensors(context):
        with torch.no_grad():
            teacher = forward(context.trained, inputs, workload.outputs)[output]
        outputs = forward(module, inputs, workload.outputs)
        if not outputs[output].is_floating_point():
            raise BadModel(
                f"distill.logits: output {output!r} is {outputs[output].dtype}, which cannot be learnt",
                where=workload.name,
                fix="return the logits from the model, and name that output with `logits`",
            )
        value = (1 - config.label_weight) * loss(outputs[output], teacher, config.temperature)
        if config.label_weight:
            value = value + config.label_weight * _label_loss(workload, outputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
        total, count = total + value.item(), count + 1
    return total / count


def _label_loss(workload: "Workload", outputs: "dict[str, torch.Tensor]", targets: Any) -> "torch.Tensor":
    import torch

    from optimize.workload import guarded

    assert workload.loss is not None
    given = workload.loss
    value = guarded(lambda: given(outputs, targets), "loss()", workload.source)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise BadWorkload(
            f"loss() returned {shape}", where=workload.source, fix="return a scalar tensor made from the outputs"
        )
    return value.reshape(())


def _tensors(context: "Context") -> Iterator[tuple[dict[str, Any], Any]]:
    import numpy as np
    import torch

    for batch in context.workload.batches("training"):
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.inputs.items()}
        targets = torch.from_numpy(batch.targets) if isinstance(batch.targets, np.ndarray) else batch.targets
        yield inputs, targets
