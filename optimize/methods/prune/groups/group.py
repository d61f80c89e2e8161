"""Group: channels that can only be removed together, and where in the model's weights they stand."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Side = Literal["out", "in", "unit"]
"""The channels that a layer makes, those that it reads, or the hidden units of a recurrent layer."""
Elements = Callable[[torch.Tensor], torch.Tensor]
"""Returns a tensor of the parameter's own shape: its data, or a score for each weight."""


@dataclass(frozen=True)
class Member:
    """A layer in which channels of a group stand.

    Args:
        layer: the layer.
        side: on which of its sides.
        channels: their indices in the layer, int64.
        roots: for each of them the index of the same channel in the group's first layer.
    """

    layer: nn.Module
    side: Side
    channels: torch.Tensor
    roots: torch.Tensor


@dataclass(frozen=True)
class Group:
    """What is ranked and removed together.

    A unit is one channel, or, where a layer normalizes or convolves its channels in equal parts, the channels at the
    same place in each part.

    Args:
        name: of the first layer.
        layers: names of all layers that lose channels of their own.
        size: channels there are now.
        parts: equal parts that they come in.
        members: every layer that is touched.
        cut: removes the channels with these indices from every member, in place.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    parts: int
    members: tuple[Member, ...]
    cut: Callable[[list[int]], None]

    @property
    def units(self) -> int:
        """The number of units."""
        return self.size // self.parts

    def remove(self, units: Iterable[int]) -> None:
        """Remove these units from the model."""
        self.cut(sorted(part * self.units + unit for part in range(self.parts) for unit in units))

    def zero(self, units: Iterable[int]) -> None:
        """Set every weight that makes or reads these units to zero."""
        gone = torch.tensor([part * self.units + unit for part in range(self.parts) for unit in units])
        with torch.no_grad():
            for member in self.members:
                where = member.channels[torch.isin(member.roots, gone)]
                for view in views(member.layer, member.side, lambda parameter: parameter.data, biases=True):
                    view[where] = 0


def tied(module: nn.Module, touched: Iterable[nn.Module | nn.Parameter]) -> bool:
    """Say whether one of these layers or parameters of a model has weights that another layer has as well."""
    owners = Counter(id(parameter) for layer in module.modules() for parameter in layer.parameters(recurse=False))
    parameters = [[one] if isinstance(one, nn.Parameter) else one.parameters(recurse=False) for one in touched]
    return any(owners[id(parameter)] > 1 for own in parameters for parameter in own)


def views(layer: nn.Module, side: Side, elements: Elements, *, biases: bool = False) -> list[torch.Tensor]:
    """Return the weights on one side of a layer, each with the channel axis first.

    What is written into them reaches the layer, but for convolutions in groups that are not depthwise.
    """
    if isinstance(layer, nn.RNNBase):
        return _recurrent(layer, side, elements, biases)
    if isinstance(layer, nn.Embedding):
        return [elements(layer.weight).movedim(1, 0)]
    if isinstance(layer, _ConvNd):
        found = [_convolution(layer, side, elements)]
    elif isinstance(layer, nn.Linear):
        found = [elements(layer.weight).movedim(0 if side == "out" else 1, 0)]
    elif isinstance(layer, _BatchNorm | nn.GroupNorm | nn.LayerNorm | nn.PReLU):
        found = [elements(layer.weight)] if layer.weight is not None and layer.weight.numel() > 1 else []
    else:
        return []
    bias = getattr(layer, "bias", None)
    return [*found, elements(bias)] if biases and side == "out" and bias is not None else found


def _convolution(layer: _ConvNd, side: Side, elements: Elements) -> torch.Tensor:
    depthwise = layer.groups == layer.out_channels > 1
    axis = 0 if depthwise or (side == "out") != layer.transposed else 1
    weight = elements(layer.weight).movedim(axis, 0)
    channels = layer.out_channels if side == "out" else layer.in_channels
    if len(weight) < channels:
        # Each group has its own channels on this axis, and as many: their weights are taken together.
        weight = weight.repeat(channels // len(weight), *[1] * (weight.dim() - 1))
    return weight


def _recurrent(layer: nn.RNNBase, side: Side, elements: Elements, biases: bool) -> list[torch.Tensor]:
    size = layer.hidden_size
    found = []
    for name, parameter in layer.named_parameters(recurse=False):
        values = elements(parameter)
        first = name in ("weight_ih_l0", "weight_ih_l0_reverse")
        if side == "in":
            found += [values.movedim(1, 0)] if first else []
            continue
        if biases or values.dim() > 1:
            found.append(values.view(-1, size, *values.shape[1:]).movedim(1, 0))
        if values.dim() > 1 and not first:
            # What the units of this layer, or of the layer below it in both directions, are read with.
            found.append(values.view(len(values), -1, size).movedim(2, 0))
    return found
