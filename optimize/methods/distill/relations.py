"""Relation distillation: the student keeps how alike the samples of a batch are to the trained model. For embeddings.

Park, Kim, Lu and Cho, "Relational Knowledge Distillation" (arXiv 1904.05068), and Tung and Mori, "Similarity-Preserving
Knowledge Distillation" (arXiv 1907.09682): not the embeddings are compared but the similarities between every two of
them, here cosines. `output_weight` draws the embeddings themselves to the trained model's as well, which keeps the
student usable on an index that the trained model has filled.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.model.errors import BadData, BadModel
from optimize.step import options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step.contract import Context

SMALLEST_VARIANCE = 0.01
"""Of cosines: in a batch of two or three the teacher's may agree by chance."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Relations:
    """Train the model to find the same samples alike as the trained model does."""

    epochs: int = options.EPOCHS
    learning_rate: float = options.LEARNING_RATE
    embedding: str = Field(default="", description="The output that holds the embeddings; the first unless named.")
    output_weight: float = options.OUTPUT_WEIGHT
    student: str = options.STUDENT
    precision: Literal["float32", "bfloat16", "auto"] = options.PRECISION


def needs(_config: Relations) -> tuple[str, ...]:
    """Return what of the workload is trained on."""
    return ("training",)


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the parameters that training could change."""
    from optimize.train import fit as train

    return train.trainable(module)


def loss(student: "torch.Tensor", teacher: "torch.Tensor", where: "torch.Tensor | None" = None) -> "torch.Tensor":
    """Return the difference of the pairwise cosines of two sets of embeddings of shape [n, …], a scalar.

    The mean square over all pairs, in units of the variance of the teacher's; 0 where there is no pair. Of embeddings
    [n, length, width] only the tokens count where `where` [n, length] says which these are.
    """
    import torch

    from optimize.source import padding

    student, teacher = padding.silenced(student, where), padding.silenced(teacher, where)

    if len(student) < 2:
        return student.sum() * 0
    rows, columns = torch.triu_indices(len(student), len(student), 1, device=student.device)
    units = [torch.nn.functional.normalize(vectors.flatten(1), dim=1) for vectors in (student, teacher)]
    given, wanted = ((vectors @ vectors.T)[rows, columns] for vectors in units)
    return ((given - wanted) ** 2).mean() / wanted.var(correction=0).clamp(min=SMALLEST_VARIANCE)


def apply(config: Relations, module: "nn.Module", context: "Context") -> "nn.Module":
    """Train `module`, or the student, in place against `context.trained` and return it in evaluation mode.

    Raises:
        BadWorkload: an output that the workload does not have.
        BadModel: the loss stopped being finite, an embedding is a single number, or the student does not fit the
            trained model.
        BadData: one sample a batch, so that there are no pairs.
    """
    from optimize.methods.distill import teacher
    from optimize.source import padding
    from optimize.train import fit as train

    workload = context.workload
    output = teacher.output_of(context, config.embedding, "distill.relations")
    precision = teacher.precision(config.precision, context, "distill.relations")
    student = teacher.student(config.student, module, context, "distill.relations")
    trained = teacher.Teacher(context, precision)
    first = next(train.tensors(workload))[0]
    if trained(first)[output].flatten(1).shape[1:] == (1,):
        raise BadModel(
            f"distill.relations: output {output!r} is one number a sample, so that every cosine is 1 or -1",
            where=workload.name,
            fix="use distill.logits for a logit, or distill.features for a number",
        )
    if len(next(iter(first.values()))) < 2:
        raise BadData(
            "distill.relations: the training batches have one sample each, so there are no pairs",
            where=workload.name,
            fix="let training() yield larger batches",
        )

    def objective(student: "nn.Module", inputs: train.Tensors, _targets: Any) -> "torch.Tensor":
        given = teacher.outputs(student, inputs, workload.outputs, precision)
        wanted = trained(inputs)
        where = padding.tokens(workload, inputs)
        value = loss(given[output], wanted[output], where)
        return value + config.output_weight * train.difference(given, wanted, where)

    return train.fit(
        student, context, objective, name="distill.relations", epochs=config.epochs, learning_rate=config.learning_rate
    )
