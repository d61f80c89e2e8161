"""Dependency: which channels of a model hang together, from torch-pruning's graph.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (arXiv 2301.12900).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from optimize.errors import BadModel
from optimize.prune import recurrent
from optimize.prune.group import Group, Member, tied

ROOTS = (_ConvNd, nn.Linear, nn.Embedding)
"""Layers whose channels start a group."""


def groups(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[Group]:
    """Return the groups of a model's convolutions, dense layers and embeddings.

    A group is left out where one of its layers shares its weights with another layer, or is an attention with heads of
    its own, whose channels cannot be taken one by one.

    Args:
        module: in evaluation mode; every parameter requires a gradient, by which the graph is traced.
        inputs: a batch, by name.

    Raises:
        BadModel: the model cannot be traced.
    """
    graph = _graph(module, inputs)
    names = {layer: name for name, layer in module.named_modules()}
    found = []
    for items in graph.get_all_groups(root_module_types=ROOTS):
        layers = [item.dep.target.module for item in items]
        if not tied(module, layers) and not any(isinstance(layer, nn.MultiheadAttention) for layer in layers):
            found.append(_group(graph, items, names))
    return found


def _graph(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    pruners = {type(layer): recurrent.InputPruner() for layer in module.modules() if isinstance(layer, nn.RNNBase)}
    try:
        with torch.enable_grad(), recurrent.opaque(module):
            return torch_pruning.DependencyGraph().build_dependency(
                module, dict(inputs), output_transform=_output_sum, customized_pruners=pruners, verbose=False
            )
    except Exception as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadModel(
            f"prune.channels cannot follow its dependencies: {message}",
            where=type(module).__name__,
            fix="leave prune.channels out of the recipe for this architecture",
        ) from error


def _group(graph: Any, items: Any, names: Mapping[nn.Module, str]) -> Group:
    root = items[0].dep.target.module
    members, layers, parts = [], [], 1
    for item in items:
        layer = item.dep.target.module
        if layer not in names:
            continue
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if out and isinstance(layer, ROOTS):
            layers.append(names[layer])
        parts = max(parts, _parts(layer))
        members.append(
            Member(layer, "out" if out else "in", torch.tensor(item.idxs), torch.tensor(list(item.root_idxs)))
        )
    size = graph.get_out_channels(root)
    cut = partial(_cut, graph, root)
    return Group(names[root], tuple(layers), size, parts, tuple(members), cut)


def _parts(layer: nn.Module) -> int:
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer.groups if isinstance(layer, _ConvNd) and layer.groups != layer.out_channels else 1


def _cut(graph: Any, root: nn.Module, channels: list[int]) -> None:
    graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, channels).prune()


def _output_sum(returned: Any) -> torch.Tensor:
    """Give the dependency graph one scalar to trace back from, whatever the model returns."""
    return sum(leaf.float().sum() for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor))  # type: ignore[return-value]
