"""Dependency: which channels of a model hang together, from torch-pruning's graph.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (arXiv 2301.12900).
"""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves
from torch_pruning.dependency import index_mapping

from optimize.methods.prune.groups import recurrent
from optimize.methods.prune.groups.group import Group, Member, tied
from optimize.model.errors import BadModel, first_line
from optimize.predict.module import arranged

ROOTS = (_ConvNd, nn.Linear, nn.Embedding)
"""Layers whose channels start a group."""
MOST_VISITS = 64
"""So often at most a group comes to one node, with other channels each time; usual ones do so once or twice."""


def groups(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[Group]:
    """Return the groups of a model's convolutions, dense layers and embeddings.

    A group is left out where one of its layers shares its weights with another layer, or is an attention with heads of
    its own, whose channels cannot be taken one by one; and where torch-pruning loses track of its channels.

    Args:
        module: in evaluation mode; every parameter requires a gradient, by which the graph is traced.
        inputs: a batch, by name.

    Raises:
        BadModel: the model cannot be traced.
    """
    cells = [name for name, layer in module.named_modules() if isinstance(layer, nn.RNNCellBase)]
    if cells:
        # Unrolled over the steps, their gates have no end of dependencies.
        raise BadModel(
            f"prune.channels cannot follow its dependencies: {', '.join(cells)} runs step by step",
            where=type(module).__name__,
            fix="let an nn.LSTM, nn.GRU or nn.RNN run over the whole sequence, or leave prune.channels out",
        )
    graph = _graph(module, inputs)
    names = {layer: name for name, layer in module.named_modules()}
    found = []
    for items in graph.get_all_groups(root_module_types=ROOTS):
        layers = [item.dep.target.module for item in items]
        followed = layers and all(root is not None for item in items for root in item.root_idxs)
        if followed and not tied(module, layers) and not any(isinstance(x, nn.MultiheadAttention) for x in layers):
            found.append(_group(graph, items, names))
    return found


def _graph(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    placed, named = arranged(module, inputs)
    pruners = {type(layer): recurrent.InputPruner() for layer in module.modules() if isinstance(layer, nn.RNNBase)}
    try:
        with torch.enable_grad(), recurrent.opaque(module), _results(module) as results:
            return _Graph().build_dependency(
                module,
                named or placed,
                output_transform=lambda returned: _ends(returned, results),
                customized_pruners=pruners,
                verbose=False,
            )
    except Exception as error:
        message = first_line(error) or type(error).__name__
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


class _Graph(torch_pruning.DependencyGraph):  # type: ignore[misc]  # the base class comes untyped
    """A graph in which a group that it cannot follow is empty, and not the end of all others."""

    def build_dependency(self, *args: Any, **named: Any) -> Any:
        with _parts_of_unknown_size():
            return super().build_dependency(*args, **named)

    def get_pruning_group(self, *args: Any, **named: Any) -> Any:
        with _parts_of_unknown_size(), _ending(), contextlib.suppress(Exception):
            return super().get_pruning_group(*args, **named)
        return []


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """Give a group up that comes to one node again and again: channels that change places come round for ever."""
    add = torch_pruning.dependency.group.Group.add_dep
    visits = Counter[tuple[int, Any]]()

    def counted(group: Any, dep: Any, idxs: Any) -> None:
        visits[id(dep.target), dep.handler] += 1
        if visits[id(dep.target), dep.handler] > MOST_VISITS:
            raise OverflowError("its channels change places")
        add(group, dep, idxs)

    torch_pruning.dependency.group.Group.add_dep = counted
    try:
        yield
    finally:
        torch_pruning.dependency.group.Group.add_dep = add


@contextlib.contextmanager
def _parts_of_unknown_size() -> Iterator[None]:
    """Leave a concatenation alone whose parts' sizes are not known: torch-pruning means to, and adds them up before."""
    update = index_mapping.update_concat_index_mapping

    def guarded(graph: Any, node: Any) -> None:
        with contextlib.suppress(TypeError):
            update(graph, node)

    index_mapping.update_concat_index_mapping = guarded
    try:
        yield
    finally:
        index_mapping.update_concat_index_mapping = update


@contextlib.contextmanager
def _results(module: nn.Module) -> Iterator[list[Any]]:
    """Collect what the layers of a module return."""
    found: list[Any] = []
    layers = [layer for layer in module.modules() if isinstance(layer, (*ROOTS, nn.RNNBase))]
    hooks = [layer.register_forward_hook(lambda _layer, _args, returned: found.append(returned)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _ends(returned: Any, results: list[Any]) -> list[torch.Tensor]:
    """Return where the graph is traced back from: the sum of the outputs, or every layer where those are labels."""
    outputs, layers = ([leaf for leaf in tree_leaves(values) if _is_traced(leaf)] for values in (returned, results))
    return [sum(leaf.float().sum() for leaf in outputs)] if outputs else layers


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad
