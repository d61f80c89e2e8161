"""Contract: a workload's parts tried on one batch, each as it will be used later."""

from collections.abc import Iterator

import numpy as np
import torch

from modelathe.tensors import Array
from optimize.checks.finding import Finding, ok, warning
from optimize.checks.subject import Subject
from optimize.judge import gate
from optimize.judge.evaluate import Quality, judge
from optimize.model import userline
from optimize.model.errors import BadModel, BadWorkload
from optimize.model.randomness import Stream
from optimize.predict.module import by_argument, forward
from optimize.source.batch import concatenate
from optimize.train import fit


def read(subject: Subject) -> Iterator[Finding]:
    """Say what was read from the data instead of being stated."""
    yield from (ok("read", line) for line in subject.workload.inferred)


def model(subject: Subject) -> Iterator[Finding]:
    """Give the trained model the first evaluation batch; say where its inputs go if not by their names.

    Raises:
        BadModel: it does not take the batch, or answers otherwise than the workload declares.
    """
    answer, taken = subject.outputs, by_argument(subject.module, [spec.name for spec in subject.workload.inputs])
    if taken is None:
        yield ok("arguments", "the inputs go to forward in their order")
    else:
        for name, argument in taken.items():
            if name != argument:
                yield ok("arguments", f"input {name} goes to forward's argument {argument}, by its place")
    yield ok("model", f"takes {userline.told(subject.batch.inputs)}, returns {userline.told(answer)}")


def scores(subject: Subject) -> Iterator[Finding]:
    """Have the scores judge the trained model on the first evaluation batch, or on the whole set if they need it.

    Raises:
        BadWorkload: they raised, or returned something else than finite numbers, one a sample.
        BadRecipe: the budget does not suit the metric.
    """
    quality = _judged(subject)
    if subject.budget is not None:
        gate.check_metric(subject.budget, quality.scores[0])
    for score in quality.scores:
        better = "more" if score.higher_is_better else "less"
        yield ok("scores", f"{score.metric} {score.value:.4f} on {len(score.samples)} samples, {better} is better")


def _judged(subject: Subject) -> Quality:
    outputs, targets = subject.outputs, concatenate([subject.batch.targets], "targets")
    try:
        return judge(subject.workload, outputs, targets, outputs)
    except BadWorkload:
        subject.whole = True
    # Scores are owed for the whole set only. Its targets are read, and the first answers stand for those to the rest.
    every = [(batch.size, batch.targets) for batch in subject.workload.batches("evaluation")]
    count = sum(size for size, _ in every)
    filled = {name: _repeated(array, count) for name, array in outputs.items()}
    return judge(subject.workload, filled, concatenate([targets for _, targets in every], "targets"), filled)


def _repeated(rows: Array, count: int) -> Array:
    repeated: Array = rows[np.arange(count) % len(rows)]
    return repeated


def loss(subject: Subject) -> Iterator[Finding]:
    """Take the loss of the first training batch and its gradients, where the workload has both.

    Raises:
        BadWorkload: it raised, or is no finite scalar made from the outputs.
        BadModel: no gradient can be taken through the model.
    """
    workload = subject.workload
    if workload.loss is None or workload.training is None:
        return
    with Stream(0).drawn():
        inputs, targets = next(fit.tensors(workload))
        module = workload.build().train()
        value = fit.label_loss(workload, forward(module, inputs, workload.outputs), targets)
        if not torch.isfinite(value):
            raise BadWorkload(
                f"loss() returned {value.item()} for the first training batch",
                where=subject.where,
                fix="let it return a finite number; look for a logarithm or a division of 0",
            )
        with fit.backward(workload):
            torch.autograd.backward(value)
    gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    if bad := next((name for name, gradient in gradients.items() if not gradient.isfinite().all()), ""):
        raise BadModel(
            f"the gradient of {bad} is not finite for the first training batch",
            where=subject.where,
            fix="look for a square root, a logarithm or a norm of 0 in forward and in loss()",
        )
    if not gradients:
        yield warning("loss", "no parameter gets a gradient: all are frozen", "set requires_grad on some of them")
    yield ok("loss", f"{value.item():.4f} on the first training batch, with gradients for {len(gradients)} tensors")
