"""Trial: whether units may be removed is found out on a copy, where they must be missed no more than zeros are.

What the model's code makes of its channels (halves, heads, a fixed reshape) stands in no dependency graph. Units that
were set to zero have a known effect, so that a removal with another one shows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from optimize.methods.prune.groups import dependency, recurrent
from optimize.methods.prune.groups.group import Group
from optimize.model.copies import copied
from optimize.predict.module import forward

LABELS = 0.001
"""Share of an output of integers that may differ: where two classes are alike, another order of summation decides."""


def groups(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[Group]:
    """Return the groups of recurrent layers and those of the dependency graph."""
    _watched(module)
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.RNNBase)]
    found = [group for name in layers if (group := recurrent.group(module, name, inputs))]
    return [*found, *dependency.groups(module, inputs)]


def remove(module: nn.Module, chosen: Mapping[str, Sequence[int]], inputs: Mapping[str, Tensor]) -> None:
    """Remove the chosen units of each group, in place."""
    _watched(module)
    for name, units in chosen.items():
        # Found anew each time: a cut moves the channels that another layer is known to read by their place.
        if group := recurrent.group(module, name, inputs):
            group.remove(units)
    for group in dependency.groups(module, inputs):
        if group.name in chosen:
            group.remove(chosen[group.name])


def _watched(module: nn.Module) -> None:
    """Let torch follow a module's parameters, in place, but for whole numbers, which have no gradient."""
    for parameter in module.eval().parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())


def some(group: Group) -> list[int]:
    """Return units of a group to try: more of its front than of its end, so that no two halves lose as many."""
    return sorted({0, 1, group.units - 1}) if group.units > 3 else [0, 1]


def exact(
    module: nn.Module, chosen: Mapping[str, Sequence[int]], inputs: Mapping[str, Tensor], outputs: Sequence[str]
) -> bool:
    """Say whether removing the chosen units of each group does what setting them to zero does.

    What the layers compute is compared as well: labels stay the same through many a wrong cut.
    """
    trial = copied(module)
    found = [group for group in groups(trial, inputs) if group.name in chosen]
    if any(group.units <= len(chosen[group.name]) or group.size % group.parts for group in found):
        return False
    for layer in trial.modules():
        # These compute a mean over the channels, zero or not, so that the two would differ.
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            layer.forward = lambda input: input  # type: ignore[method-assign]
    try:
        for group in found:
            group.zero(chosen[group.name])
        wanted, layers = _results(trial, inputs, outputs)
        remove(trial, chosen, inputs)
        got, after = _results(trial, inputs, outputs)
    except Exception:
        # Whatever stands in the way (a fixed reshape, an operator that the graph cannot follow), the group stays whole.
        return False
    whole = [(one, other) for one, other in zip(after, layers, strict=False) if one.shape == other.shape]
    pairs = [*((got[name], wanted[name]) for name in wanted), *whole]
    return len(layers) == len(after) and all(_same(one, other) for one, other in pairs)


def sound(
    module: nn.Module,
    chosen: Mapping[str, list[int]],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    say: Callable[[str], object],
) -> dict[str, list[int]]:
    """Return of the chosen units those that may go together, and `say` of which groups all units stay."""
    if exact(module, chosen, inputs, outputs):
        return dict(chosen)
    kept: dict[str, list[int]] = {}
    for name, units in chosen.items():
        if exact(module, {**kept, name: units}, inputs, outputs):
            kept[name] = units
    left = ", ".join(name for name in chosen if name not in kept)
    say(f"left alone, for without these channels the model answers otherwise: {left}")
    return kept


def _results(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the outputs by name, and the first row of what each layer computes, in the order of the calls."""
    seen: list[Tensor] = []

    def note(_layer: nn.Module, _args: Any, returned: Any) -> None:
        # A copy: what comes next may write into it.
        seen.extend(leaf[:1].clone() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.dim())

    hooks = [layer.register_forward_hook(note) for layer in module.modules() if not list(layer.children())]
    try:
        with torch.no_grad():
            return forward(module, inputs, tuple(outputs)), seen
    finally:
        for hook in hooks:
            hook.remove()


def _same(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape or not wanted.numel():
        return got.shape == wanted.shape
    if not wanted.is_floating_point():
        return (got != wanted).float().mean().item() <= LABELS
    scale = wanted.nan_to_num().abs().max().item()
    return torch.allclose(got, wanted, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
