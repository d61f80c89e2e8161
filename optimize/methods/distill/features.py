"""Feature distillation: the student's inner layers learn to give what the trained model's give.

Romero and others, "FitNets" (arXiv 1412.6550): where a student's layer is narrower, a linear projection that is learnt
along and thrown away brings it to the teacher's width. Sun and others, "Patient Knowledge Distillation" (arXiv
1908.09355): layers of a shallower student learn from evenly spaced ones of the teacher. A module that returns several
tensors is matched tensor by tensor, so that an attention module that returns its attention map teaches that too.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.step import options

if TYPE_CHECKING:
    from torch import nn

    from optimize.step.contract import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Features:
    """Train the model to give the hidden states of the trained model."""

    epochs: int = options.EPOCHS
    learning_rate: float = options.LEARNING_RATE
    layers: tuple[str, ...] = Field(
        default=(),
        description="Pairs STUDENT:TEACHER of module names or globs; where a glob finds fewer in the student, the "
        "teacher's are taken evenly spaced. Without one: layers of the same name, else all, evenly spaced.",
    )
    loss: Literal["mse", "cosine"] = Field(
        default="mse", description="Mean square in units of the teacher's variance, or one minus the cosine."
    )
    output_weight: float = options.OUTPUT_WEIGHT
    student: str = options.STUDENT
    precision: Literal["float32", "bfloat16", "auto"] = options.PRECISION


def needs(_config: Features) -> tuple[str, ...]:
    """Return what of the workload is trained on."""
    return ("training",)


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the layers that could learn."""
    from optimize.methods.distill import layers

    return layers.blocks(module)


def apply(config: Features, module: "nn.Module", context: "Context") -> "nn.Module":
    """Train `module`, or the student, in place against `context.trained` and return it in evaluation mode.

    Raises:
        NoEffect: a pair that matches no module, or no layers to pair.
        BadModel: two layers differ in more than their width, the loss stopped being finite, or the student does not
            fit the trained model.
    """
    import torch

    from optimize.methods.distill import layers, teacher
    from optimize.source import padding
    from optimize.train import fit as train

    workload = context.workload
    precision = teacher.precision(config.precision, context, "distill.features")
    student = teacher.student(config.student, module, context, "distill.features")
    pairs = layers.paired(config.layers, student, context.trained)
    torch.manual_seed(context.seed)
    with layers.Match(student, context.trained, pairs, next(train.tensors(workload))[0], config.loss) as match:

        def objective(_learner: "nn.Module", inputs: train.Tensors, _targets: Any) -> torch.Tensor:
            with torch.no_grad():
                wanted = teacher.outputs(context.trained, inputs, workload.outputs, precision)
            given = teacher.outputs(student, inputs, workload.outputs, precision)
            where = padding.tokens(workload, inputs)
            value = match.distance(where)
            if config.output_weight:
                value = value + config.output_weight * train.difference(given, wanted, where)
            return value

        train.fit(
            torch.nn.ModuleList([student, match.projections]),
            context,
            objective,
            name="distill.features",
            epochs=config.epochs,
            learning_rate=config.learning_rate,
        )
    return student
