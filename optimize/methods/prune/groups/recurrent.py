"""Recurrent: the hidden units of LSTM, GRU and RNN layers, and the layers that read them.

A unit goes with its rows in all gates, its recurrent columns and the columns of its readers, as in Wen et al.,
"Learning Intrinsic Sparse Structures within Long Short-Term Memory", ICLR 2018 (arXiv 1709.05027). All layers and both
directions of one module have one number of units and lose the same ones.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from optimize.methods.prune.groups.group import Group, Member, tied
from optimize.predict.module import call_with

READERS = (nn.Linear, _ConvNd, nn.RNNBase)
"""Layers that mix the channels of their input; behind them no channel can be told from another."""


class InputPruner(torch_pruning.function.BasePruningFunc):  # type: ignore[misc]
    """Tells torch-pruning's graph what a recurrent layer reads; its own units are not the graph's to remove."""

    def prune_out_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        """Refuse: the caller leaves such a group alone."""
        raise NotImplementedError("hidden units are not removed through the graph")

    def prune_in_channels(self, layer: nn.RNNBase, idxs: Sequence[int]) -> nn.Module:
        """Remove input channels."""
        cut_input(layer, list(idxs))
        return layer

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        """Return how many channels the output has."""
        return layer.hidden_size * (1 + layer.bidirectional)

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        """Return how many channels the input has."""
        return layer.input_size


class _Step(torch.autograd.Function):
    """A recurrent layer as one node of the autograd graph, which is otherwise unrolled over time."""

    @staticmethod
    def forward(_ctx: Any, call: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        output, state = call(*tensors)
        return (output, *state) if isinstance(state, tuple) else (output, state)

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> Any:
        raise NotImplementedError("this graph is only looked at")


@contextlib.contextmanager
def opaque(module: nn.Module) -> Iterator[None]:
    """Let every recurrent layer be one node of the autograd graph."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]
    for layer in layers:
        layer.forward = partial(_as_one_node, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _as_one_node(layer: nn.RNNBase, inputs: torch.Tensor, hx: Any = None) -> Any:
    def call(given: torch.Tensor, *states: torch.Tensor) -> Any:
        state = None if hx is None else states if isinstance(layer, nn.LSTM) else states[0]
        return type(layer).forward(layer, given, state)

    output, *states = _Step.apply(call, inputs, *tree_leaves(hx if hx is not None else ()))  # type: ignore[no-untyped-call]
    return output, tuple(states) if isinstance(layer, nn.LSTM) else states[0]


def group(module: nn.Module, name: str, inputs: Mapping[str, torch.Tensor]) -> Group | None:
    """Return the units of the recurrent layer `name`, or None where they cannot be followed to all their readers."""
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.RNNBase) or layer.proj_size:
        return None
    readers = _readers(module, layer, inputs)
    if readers is None or tied(module, [layer, *(member.layer for member in readers)]):
        return None
    every = torch.arange(layer.hidden_size)
    members = (Member(layer, "unit", every, every), *readers)
    return Group(name, (name,), layer.hidden_size, 1, members, partial(_cut, layer, readers))


def _readers(module: nn.Module, layer: nn.RNNBase, inputs: Mapping[str, torch.Tensor]) -> list[Member] | None:
    """Find which input channels of which layers carry which unit, or None where that cannot be said.

    Some units are made NaN, and the channels in which a NaN arrives are noted: once for each bit of a unit's number,
    with the units that have the bit and with those that do not. A channel that carries one unit sees a NaN in exactly
    one run of each pair.
    """
    numbers = torch.arange(layer.hidden_size)
    bits = max(1, math.ceil(math.log2(layer.hidden_size)))
    hits: dict[nn.Module, list[list[torch.Tensor]]] = {}
    for bit in range(bits):
        for value in (0, 1):
            marks = _arrivals(module, layer, (numbers >> bit) & 1 == value, inputs)
            if marks is None:
                return None
            for reader, mark in marks.items():
                hits.setdefault(reader, [[torch.zeros_like(mark)] * 2 for _ in range(bits)])[bit][value] = mark
    members = []
    for reader, pairs in hits.items():
        ones, zeros = (torch.stack([pair[value] for pair in pairs]) for value in (1, 0))
        touched = (ones | zeros).any(0)
        if not (ones ^ zeros)[:, touched].all():
            return None
        columns = touched.nonzero().flatten()
        units = (ones[:, touched] * 2 ** torch.arange(bits)[:, None]).sum(0)
        members.append(Member(reader, "out" if isinstance(reader, _BatchNorm) else "in", columns, units))
    return members


def _arrivals(
    module: nn.Module, layer: nn.RNNBase, units: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> dict[nn.Module, torch.Tensor] | None:
    """Make some units NaN and return for each reader which channels of its input that reaches.

    None where a NaN comes out of the model, or the model does not run.
    """
    marks: dict[nn.Module, torch.Tensor] = {}

    def mark(_layer: nn.Module, _args: Any, returned: Any) -> Any:
        def spoil(tensor: torch.Tensor) -> torch.Tensor:
            spoiled = tensor.clone(memory_format=torch.contiguous_format)
            spoiled.view(-1, layer.hidden_size)[:, units] = torch.nan
            return spoiled

        return tree_map(spoil, returned)

    def note(reader: nn.Module, args: tuple[Any, ...]) -> Any:
        given = args[0]
        axis = 1 if isinstance(reader, _ConvNd | _BatchNorm) else -1
        arrived = given.isnan().movedim(axis, 0).flatten(1).any(1)
        if arrived.any():
            marks[reader] = marks.get(reader, torch.zeros_like(arrived)) | arrived
        # A BatchNorm works on each channel alone; behind any other reader the marks would be everywhere.
        return args if isinstance(reader, _BatchNorm) else tree_map_only(torch.Tensor, torch.nan_to_num, args)

    hooks = [layer.register_forward_hook(mark)]
    hooks += [
        reader.register_forward_pre_hook(note)
        for reader in module.modules()
        if isinstance(reader, (*READERS, _BatchNorm))
    ]
    try:
        with torch.no_grad():
            returned = call_with(module, inputs)
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    visible = any(leaf.isnan().any() for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor))
    return None if visible else marks


def _cut(layer: nn.RNNBase, readers: Sequence[Member], units: list[int]) -> None:
    size = layer.hidden_size
    keep = torch.tensor([unit for unit in range(size) if unit not in set(units)])
    for name, parameter in list(layer.named_parameters(recurse=False)):
        kept = parameter.detach().view(-1, size, *parameter.shape[1:])[:, keep].flatten(0, 1)
        if kept.dim() > 1 and name not in ("weight_ih_l0", "weight_ih_l0_reverse"):
            kept = kept.view(len(kept), -1, size)[:, :, keep].flatten(1)
        setattr(layer, name, nn.Parameter(kept.contiguous()))
    layer.hidden_size = len(keep)
    layer.flatten_parameters()
    for reader in readers:
        gone = reader.channels[torch.isin(reader.roots, torch.tensor(units))].tolist()
        _cut_reader(reader.layer, gone)


def _cut_reader(layer: nn.Module, channels: list[int]) -> None:
    if isinstance(layer, nn.RNNBase):
        cut_input(layer, channels)
    elif isinstance(layer, nn.Linear):
        torch_pruning.prune_linear_in_channels(layer, channels)
    elif isinstance(layer, _BatchNorm):
        torch_pruning.prune_batchnorm_out_channels(layer, channels)
    else:
        torch_pruning.prune_conv_in_channels(layer, channels)


def cut_input(layer: nn.RNNBase, channels: list[int]) -> None:
    """Remove input channels of a recurrent layer, in place."""
    keep = torch.tensor([channel for channel in range(layer.input_size) if channel not in set(channels)])
    for name in ("weight_ih_l0", "weight_ih_l0_reverse")[: 1 + layer.bidirectional]:
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[:, keep].contiguous()))
    layer.input_size = len(keep)
    layer.flatten_parameters()
