"""Logit distillation: the student learns the trained model's softened class probabilities.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): the Kullback–Leibler
divergence between both models' softmax at temperature T, times T² so that its gradient keeps its size as T grows,
mixed with the workload's own loss on the labels where a weight for it is given. One logit stands for two classes, and
so does each of several that exclude nothing (multi-label): there the divergence is that of two Bernoulli distributions,
whose probability is the sigmoid of the logit over T.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.model.errors import BadModel
from optimize.step import options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step.contract import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Logits:
    """Train the model to give the trained model's class probabilities."""

    epochs: int = options.EPOCHS
    learning_rate: float = options.LEARNING_RATE
    temperature: float = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="Softens both models' probabilities."
    )
    label_weight: float = Field(default=0.0, ge=0, le=1, description="Share of the workload's own loss on the labels.")
    logits: str = Field(default="", description="The output that holds the logits; the first one unless named.")
    class_axis: int = Field(
        default=0,
        description="Axis of the logits that holds the classes, such as 1 or -1. 0 is the last one of [n, classes] and "
        "[n, tokens, classes], and 1 of maps: [n, classes, height, width] and [n, classes, depth, height, width], and "
        "of [n, classes, length] where the targets are [n, length].",
    )
    form: Literal["auto", "softmax", "sigmoid"] = Field(
        default="auto",
        description="softmax for classes that exclude each other, sigmoid for labels that do not; auto is sigmoid for "
        "one class, and where the targets are a 0 or 1 for each class and not one 1 in all.",
    )
    student: str = options.STUDENT
    precision: Literal["float32", "bfloat16", "auto"] = options.PRECISION


def needs(config: Logits) -> tuple[str, ...]:
    """Return what of the workload is trained on."""
    return ("training", "loss") if config.label_weight else ("training",)


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the parameters that training could change."""
    from optimize.train import fit as train

    return train.trainable(module)


def loss(
    student: "torch.Tensor",
    teacher: "torch.Tensor",
    temperature: float,
    class_axis: int = 0,
    where: "torch.Tensor | None" = None,
    *,
    independent: bool = False,
) -> "torch.Tensor":
    """Return the distillation loss, a scalar: the mean over samples and positions.

    Args:
        student: logits, float32, of any shape with the batch first; [n] and one class on the class axis are binary.
        teacher: logits of the same shape.
        temperature: above 0.
        class_axis: as in `Logits`.
        where: bool [n, length], which positions of logits [n, length, classes] are tokens; the others do not count.
        independent: the classes do not exclude each other; the divergence is the sum of theirs.
    """
    from torch.nn import functional

    from optimize.source import padding

    if student.dim() == 1:
        student, teacher = student[:, None], teacher[:, None]
    axis = class_axis or (1 if student.dim() > 3 else -1)
    mine, theirs = (
        padding.kept(logits.movedim(axis, -1), where).reshape(-1, logits.shape[axis]) / temperature
        for logits in (student, teacher)
    )
    if independent or mine.shape[1] == 1:
        # The other class has the logit 0: softmax over both is the sigmoid.
        mine, theirs = (functional.pad(logits[..., None], (0, 1)) for logits in (mine, theirs))
    divergence = functional.kl_div(
        functional.log_softmax(mine, dim=-1),
        functional.log_softmax(theirs, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def apply(config: Logits, module: "nn.Module", context: "Context") -> "nn.Module":
    """Train `module`, or the student, in place against `context.trained` and return it in evaluation mode.

    Raises:
        BadWorkload: an output that the workload does not have.
        BadModel: the loss stopped being finite, the output holds no floating point numbers or has no such class axis,
            or the student does not fit the trained model.
    """
    from optimize.methods.distill import teacher
    from optimize.source import padding
    from optimize.train import fit as train

    workload = context.workload
    output = teacher.output_of(context, config.logits, "distill.logits")
    precision = teacher.precision(config.precision, context, "distill.logits")
    student = teacher.student(config.student, module, context, "distill.logits")
    trained = teacher.Teacher(context, precision)
    inputs, targets = next(train.tensors(workload))
    first = trained(inputs)[output]
    _check(config, first, output, workload.name)
    axis = config.class_axis or _axis(first, targets)
    independent = config.form == "sigmoid" or (config.form == "auto" and _are_independent(first, targets, axis))

    def objective(student: "nn.Module", inputs: train.Tensors, targets: Any) -> "torch.Tensor":
        outputs = teacher.outputs(student, inputs, workload.outputs, precision)
        logits, wanted = outputs[output], trained(inputs)[output]
        where = padding.tokens(workload, inputs)
        value = loss(logits, wanted, config.temperature, axis, where, independent=independent)
        value = (1 - config.label_weight) * value
        if config.label_weight:
            value = value + config.label_weight * train.label_loss(workload, outputs, targets)
        return value

    return train.fit(
        student, context, objective, name="distill.logits", epochs=config.epochs, learning_rate=config.learning_rate
    )


def _axis(logits: "torch.Tensor", targets: Any) -> int:
    """Return 1 for [n, classes, length] with targets [n, length]; 0, which says nothing, for any other logits."""
    shape = tuple(getattr(targets, "shape", ()))
    n, first, last = (*logits.shape, 0, 0)[:3]
    return 1 if logits.dim() == 3 and shape == (n, last) and first != last else 0


def _are_independent(logits: "torch.Tensor", targets: Any, axis: int) -> bool:
    """Say whether the targets are a 0 or 1 for each class, and in some sample none or several are 1."""
    import torch

    if not isinstance(targets, torch.Tensor) or targets.shape != logits.shape or logits.dim() < 2:
        return False
    sums = targets.float().sum(axis or (1 if logits.dim() > 3 else -1))
    return bool(((targets == 0) | (targets == 1)).all()) and bool((sums != 1).any())


def _check(config: Logits, logits: "torch.Tensor", output: str, where: str) -> None:
    axis = config.class_axis
    if axis and not -logits.dim() < axis < logits.dim():
        raise BadModel(
            f"distill.logits: output {output!r} has the shape {tuple(logits.shape)}, so no class axis {axis}",
            where=where,
            fix=f"set class_axis to one of 1 to {logits.dim() - 1}, or leave it out",
        )
    if config.form == "softmax" and logits.dim() > 1 and logits.shape[axis or (1 if logits.dim() > 3 else -1)] == 1:
        raise BadModel(
            f"distill.logits: output {output!r} has one class, of which a softmax is always 1",
            where=where,
            fix='set form = "sigmoid", or class_axis to the axis that holds the classes',
        )
