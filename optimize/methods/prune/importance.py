"""Importance: the score by which channels are ranked.

Each score gives the weights of one layer that make or read a channel a value; a channel's score is the mean of these
over the layers of its group, and is divided by the mean over the group, so that layers compare.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from optimize.methods.prune.groups.group import Group, Side, views
from optimize.predict.module import forward
from optimize.source import padding, sample
from optimize.train import fit as train

if TYPE_CHECKING:
    from optimize.step.contract import Context

Score = Literal["l1", "l2", "taylor", "bn_scale", "lamp", "activation"]
Saliency = Callable[[nn.Module, Side], list[torch.Tensor]]
"""Returns tensors with the channels of one side of a layer on their first axis; none where it says nothing of them."""
TAYLOR_BATCHES = 50
"""Batches whose gradients are looked at, drawn from a whole epoch; a ranking settles before that."""


def saliency(score: Score, module: nn.Module, context: "Context") -> Saliency:
    """Return what `score` says of each layer.

    `l1`: absolute weights (Li et al., arXiv 1608.08710). `l2`: squared weights. `lamp`: the same, normalized in `rank`.
    `bn_scale`: scale of the batch normalization (Liu et al., arXiv 1708.06519). `taylor`: square of the sum of weight
    times gradient of the loss, the mean over batches: the group contribution of Molchanov et al. (arXiv 1906.10771), by
    which the loss would change without the channel; a frozen weight counts too. `activation`: mean absolute value
    where the channel is read (Molchanov et al., arXiv 1611.06440).

    Raises:
        BadWorkload: of the workload's data and loss.
    """
    if score == "activation":
        return _activation(module, context)
    if score == "taylor":
        contributions = _taylor(module, context)
        return lambda layer, side: contributions.get((layer, side), [])
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


def _taylor(module: nn.Module, context: "Context") -> dict[tuple[nn.Module, Side], list[torch.Tensor]]:
    """Return one tensor [channels] for each side of a layer: what its channels contribute to the loss, squared."""
    workload = context.workload
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    squares: dict[tuple[nn.Module, Side], list[torch.Tensor]] = {}
    for parameter in frozen:
        parameter.requires_grad_(True)
    for inputs, targets in train.as_tensors(sample.batches(workload, "training", TAYLOR_BATCHES, context.seed)):
        loss = train.label_loss(workload, forward(module, inputs, workload.outputs), targets)
        with train.backward(workload):
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        changes = {id(own): own.detach() * gradient for own, gradient in zip(parameters, gradients, strict=True)}
        for layer, side, change in _changes(module, changes):
            before = squares.setdefault((layer, side), [torch.zeros_like(change)])
            before[0] += change.square()
    for parameter in frozen:
        parameter.requires_grad_(False)
    return squares


def _changes(module: nn.Module, changes: Mapping[int, torch.Tensor]) -> Iterator[tuple[nn.Module, Side, torch.Tensor]]:
    """Yield for each side of each layer the sum of `changes`, which are by parameter, over each channel's weights."""
    sides: tuple[Side, ...] = get_args(Side)
    for layer in module.modules():
        for side in sides if layer._parameters else ():
            made = views(layer, side, lambda parameter: changes[id(parameter)], biases=True)
            if made:
                sums = [view.flatten(1).sum(1) if view.dim() > 1 else view for view in made]
                yield layer, side, torch.stack(sums).sum(0)


def _activation(module: nn.Module, context: "Context") -> Saliency:
    sums: dict[nn.Module, torch.Tensor] = {}
    counts: Counter[nn.Module] = Counter()
    where: torch.Tensor | None = None

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0].movedim(1, -1) if isinstance(layer, _ConvNd) else args[0]
        if not isinstance(layer, _ConvNd) or given.dim() == 3:
            given = padding.kept(given, where)
        vectors = given.abs().flatten(0, -2).double()
        sums[layer] = sums.get(layer, 0) + vectors.sum(0)
        counts[layer] += len(vectors)

    hooks = [
        layer.register_forward_pre_hook(note)
        for layer in module.modules()
        if isinstance(layer, _ConvNd | nn.Linear | nn.RNNBase)
    ]
    try:
        with torch.no_grad():
            for inputs, where in padding.calibration(context.workload):  # noqa: B007  # read in `note`
                forward(module, inputs, context.workload.outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return lambda layer, side: [sums[layer] / counts[layer]] if side == "in" and layer in sums else []
