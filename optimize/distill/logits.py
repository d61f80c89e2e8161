"""Logit distillation: the student learns the trained model's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): the Kullback–Leibler
divergence between both models' softmax at temperature T, times T² so that its gradient keeps its size as T grows,
mixed with the workload's own loss on the labels where a weight for it is given.
"""

from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.errors import BadModel, BadWorkload

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Logits:
    """Train the model to give the trained model's class probabilities."""

    epochs: int = Field(default=4, ge=1, description="Passes over the training data.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak rate of AdamW; it falls along a cosine.")
    temperature: float = Field(default=4.0, gt=0, description="Softens both models' probabilities.")
    label_weight: float = Field(default=0.0, ge=0, le=1, description="Share of the workload's own loss on the labels.")
    logits: str = Field(default="", description="The output that holds the logits; the first one unless named.")


def needs(config: Logits) -> tuple[str, ...]:
    """Return what of the workload is trained on."""
    return ("training", "loss") if config.label_weight else ("training",)


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
        BadWorkload: an output that the workload does not have.
        BadModel: the loss stopped being finite, or the output holds no floating point numbers.
    """
    import torch

    from optimize import train
    from optimize.predict import forward

    workload = context.workload
    output = config.logits or workload.outputs[0]
    if output not in workload.outputs:
        raise BadWorkload(
            f"distill.logits: there is no output {output!r}", fix=f"outputs: {', '.join(workload.outputs)}"
        )

    def objective(student: "nn.Module", inputs: train.Tensors, targets: Any) -> torch.Tensor:
        with torch.no_grad():
            teacher = forward(context.trained, inputs, workload.outputs)[output]
        outputs = forward(student, inputs, workload.outputs)
        if not outputs[output].is_floating_point():
            raise BadModel(
                f"distill.logits: output {output!r} is {outputs[output].dtype}, which cannot be learnt",
                where=workload.name,
                fix="return the logits from the model, and name that output with `logits`",
            )
        value = (1 - config.label_weight) * loss(outputs[output], teacher, config.temperature)
        if config.label_weight:
            value = value + config.label_weight * train.label_loss(workload, outputs, targets)
        return value

    return train.fit(
        module, context, objective, name="distill.logits", epochs=config.epochs, learning_rate=config.learning_rate
    )
