"""Logit distillation: the student learns the trained model's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): the Kullback–Leibler
divergence between both models' softmax at temperature T, times T² so that its gradient keeps its size as T grows,
mixed with the workload's own loss on the labels where a weight for it is given.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Logits:
    """Train the model to give the trained model's class probabilities."""

    epochs: int = Field(default=4, ge=1, description="Passes over the training data.")
    learning_rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="Peak rate of AdamW; it falls along a cosine."
    )
    temperature: float = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="Softens both models' probabilities."
    )
    label_weight: float = Field(default=0.0, ge=0, le=1, description="Share of the workload's own loss on the labels.")
    logits: str = Field(default="", description="The output that holds the logits; the first one unless named.")
    student: str = Field(default="", description="The workload's student to train; the model as it comes unless named.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the forward passes; bfloat16 is faster where the hardware has it."
    )


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
    """Train `module`, or the student, in place against `context.trained` and return it in evaluation mode.

    Raises:
        BadWorkload: an output that the workload does not have.
        BadModel: the loss stopped being finite, the output holds no floating point numbers, or the student does not
            fit the trained model.
    """
    from optimize import train
    from optimize.distill import teacher

    workload = context.workload
    output = teacher.output_of(context, config.logits, "distill.logits")
    student = teacher.student(config.student, module, context, "distill.logits")
    trained = teacher.Teacher(context, config.precision)

    def objective(student: "nn.Module", inputs: train.Tensors, targets: Any) -> "torch.Tensor":
        outputs = teacher.outputs(student, inputs, workload.outputs, config.precision)
        value = (1 - config.label_weight) * loss(outputs[output], trained(inputs)[output], config.temperature)
        if config.label_weight:
            value = value + config.label_weight * train.label_loss(workload, outputs, targets)
        return value

    return train.fit(
        student, context, objective, name="distill.logits", epochs=config.epochs, learning_rate=config.learning_rate
    )
