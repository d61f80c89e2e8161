"""Dependency-aware channel pruning.

Whole output channels of convolutions and rows of linear layers are removed, together with everything that depends on
them (the next layer's inputs, batch norms, residual partners), as in Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023 (arXiv 2301.12900). The dependency graph and the grouping are torch-pruning's; the score of a
group is the norm of its weights (Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710).
"""

import copy
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.errors import BadModel, NoEffect

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.step import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Channels:
    """Remove the channels with the smallest weights, and all that depends on them."""

    ratio: float = Field(default=0.5, gt=0, lt=1, description="Share of the channels that is removed.")
    norm: Literal["l1", "l2"] = Field(default="l2", description="Norm of a channel's weights that ranks it.")
    scope: Literal["layer", "global"] = Field(
        default="layer", description="Remove the share in every layer, or rank all layers' channels together."
    )
    round_to: int = Field(default=1, ge=1, description="Keep a multiple of this many channels in each layer.")
    exclude: tuple[str, ...] = Field(default=(), description="Layers to leave alone, as globs on module names.")


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the layers whose channels could be removed."""
    from torch import nn

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    return [name for name, layer in module.named_modules() if isinstance(layer, layers)]


def apply(config: Channels, module: "nn.Module", context: "Context") -> "nn.Module":
    """Remove `config.ratio` of the channels of `module`, in place, and return it.

    A layer whose channels are visible from outside (they are the model's outputs, or their number is written into the
    model's code) is found by trying, and left alone.

    Raises:
        NoEffect: no layer is left that may be pruned.
        BadModel: the dependency graph cannot be built for this architecture.
    """
    import torch_pruning

    inputs = _example(context)
    _check_traceable(module, inputs)
    names = matches(module)
    excluded = [name for name in names if any(fnmatch(name, pattern) for pattern in config.exclude)]
    fixed = [name for name in names if name not in excluded and not _prunable(module, name, inputs, context)]
    free = [name for name in names if name not in {*excluded, *fixed}]
    if not free:
        raise NoEffect(
            "prune.channels found no layer that it may prune",
            where=context.workload.name,
            fix=f"fixed by the model's outputs or code: {', '.join(fixed) or 'none'}; "
            f"excluded: {', '.join(excluded) or 'none'}",
        )
    pruner = torch_pruning.pruner.BasePruner(
        module,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p={"l1": 1, "l2": 2}[config.norm]),
        global_pruning=config.scope == "global",
        pruning_ratio=config.ratio,
        round_to=config.round_to if config.round_to > 1 else None,
        ignored_layers=[module.get_submodule(name) for name in (*excluded, *fixed)],
        output_transform=_output_sum,
    )
    pruner.step()
    return module


def _example(context: "Context") -> "dict[str, torch.Tensor]":
    import numpy as np
    import torch

    rng = np.random.default_rng(context.seed)
    return {spec.name: torch.from_numpy(spec.generate(rng, batch=2)) for spec in context.workload.inputs}


def _check_traceable(module: "nn.Module", inputs: "dict[str, torch.Tensor]") -> None:
    import torch_pruning

    try:
        torch_pruning.DependencyGraph().build_dependency(copy.deepcopy(module), inputs, output_transform=_output_sum)
    except Exception as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadModel(
            f"prune.channels cannot follow its dependencies: {message}",
            where=type(module).__name__,
            fix="leave prune.channels out of the recipe for this architecture",
        ) from error


def _prunable(module: "nn.Module", name: str, inputs: "dict[str, torch.Tensor]", context: "Context") -> bool:
    """Try on a copy whether the model still runs, with outputs of the same shape, without one channel of `name`."""
    import torch
    import torch_pruning

    from optimize.predict import forward

    trial = copy.deepcopy(module)
    names = context.workload.outputs
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(trial, inputs, output_transform=_output_sum)
        layer = trial.get_submodule(name)
        prune = torch_pruning.function.PrunerBox[torch_pruning.ops.module2type(layer)].prune_out_channels
        graph.get_pruning_group(layer, prune, idxs=[0]).prune()
        with torch.inference_mode():
            after = forward(trial, inputs, names)
            before = forward(module, inputs, names)
    except Exception:
        # Whatever stands in the way (a fixed reshape, an operator that the graph cannot follow), the layer stays whole.
        return False
    return all(after[output].shape == before[output].shape for output in names)


def _output_sum(returned: Any) -> "torch.Tensor":
    """Give the dependency graph one scalar to trace back from, whatever the model returns."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return sum(leaf.float().sum() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor))  # type: ignore[return-value]
