"""Importance: the score by which channels are ranked.

Each score gives every weight that makes or reads a channel a value; a channel's score is the sum over one layer's
weights, the mean over the layers of its group, and is divided by the mean over the group, so that layers compare.
"""

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from optimize import train
from optimize.predict import forward
from optimize.prune.group import Group, Side, views

if TYPE_CHECKING:
    from optimize.step import Context

Score = Literal["l1", "l2", "taylor", "bn_scale", "lamp", "activation"]
Saliency = Callable[[nn.Module, Side], list[torch.Tensor]]
"""Returns tensors with the channels of one side of a layer on their first axis; none where it says nothing of them."""
TAYLOR_BATCHES = 50
"""Batches whose gradients are added up; a ranking settles before that."""


def saliency(score: Score, module: nn.Module, context: "Context") -> Saliency:
    """Return what `score` says of each layer.

    `l1`: absolute weights (Li et al., arXiv 1608.08710). `l2`: squared weights. `lamp`: the same, normalized in `rank`.
    `bn_scale`: scale of the batch normalization (Liu et al., arXiv 1708.06519). `taylor`: weight times gradient of the
    loss (Molchanov et al., arXiv 1906.10771). `activation`: mean absolute value where the channel is read (Molchanov
    et al., arXiv 1611.06440).

    Raises:
        BadWorkload: of the workload's data and loss.
    """
    if score == "activation":
        return _activation(module, context)
    if score == "taylor":
        changes = _taylor(module, context)
        return lambda layer, side: views(layer, side, lambda parameter: changes[id(parameter)])
    if score == "bn_scale":
        return lambda layer, side: (
            views(layer, side, lambda parameter: parameter.detach().abs()) if isinstance(layer, _BatchNorm) else []
        )
    power = 1 if score == "l1" else 2
    return lambda layer, side: views(layer, side, lambda parameter: parameter.detach().abs() ** power)


def rank(group: Group, score: Score, salient: Saliency) -> torch.Tensor | None:
    """Return the scores of a group's units, float64, or None where the score says nothing of them."""
    total, count = torch.zeros(group.size, dtype=torch.float64), 0
    for member in group.members:
        for tensor in salient(member.layer, member.side):
            values = tensor.flatten(1).sum(1) if tensor.dim() > 1 else tensor
            total.index_add_(0, member.roots, values[member.channels].double())
            count += 1
    if not count:
        return None
    scores = total.view(group.parts, -1).mean(0) / count
    return _lamp(scores) if score == "lamp" else scores / scores.mean().clamp(min=1e-30)


def _lamp(scores: torch.Tensor) -> torch.Tensor:
    """Divide each score by the sum of those that are not smaller (Lee et al., arXiv 2010.07611)."""
    values, order = scores.sort()
    left = values.flip(0).cumsum(0).flip(0)
    return torch.empty_like(scores).index_copy_(0, order, values / left.clamp(min=1e-30))


def _taylor(module: nn.Module, context: "Context") -> dict[int, torch.Tensor]:
    workload = context.workload
    parameters = list(module.parameters())
    changes = {id(parameter): torch.zeros_like(parameter) for parameter in parameters}
    for inputs, targets in islice(train.tensors(workload), TAYLOR_BATCHES):
        loss = train.label_loss(workload, forward(module, inputs, workload.outputs), targets)
        with train.backward(workload):
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                changes[id(parameter)] += (parameter.detach() * gradient).abs()
    return changes


def _activation(module: nn.Module, context: "Context") -> Saliency:
    totals: dict[nn.Module, torch.Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0].abs().movedim(1 if isinstance(layer, _ConvNd) else -1, 0).flatten(1).double().mean(1)
        totals[layer] = totals.get(layer, torch.zeros_like(given)) + given

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in module.modules()
        if isinstance(layer, _ConvNd | nn.Linear | nn.RNNBase)
    ]
    try:
        with torch.inference_mode():
            for inputs, _targets in train.tensors(context.workload, "calibration"):
                forward(module, inputs, context.workload.outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return lambda layer, side: [totals[layer]] if side == "in" and layer in totals else []
