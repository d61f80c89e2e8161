"""Structured pruning of channels and hidden units.

Whole output channels of convolutions, rows of dense layers, dims of embeddings and hidden units of recurrent layers are
removed, together with everything that depends on them (the next layer's inputs, batch norms, residual partners), as in
Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (arXiv 2301.12900). The papers of the scores stand in
`optimize/methods/prune/importance.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.model import globs
from optimize.model.errors import NoEffect
from optimize.step import options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from optimize.methods.prune.ranking import Ranked
    from optimize.step.contract import Context

    Inputs = Mapping[str, torch.Tensor]

SAMPLES = 4
"""Samples of the evaluation set on which a cut is tried."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Channels:
    """Remove the least important channels and hidden units, and all that depends on them."""

    ratio: float = Field(default=0.5, gt=0, lt=1, description="Share that is removed.")
    of: Literal["channels", "macs", "parameters", "latency"] = Field(
        default="channels",
        description="What the share is taken of: each layer's channels, or a cost of the whole model; latency is "
        "measured at the target's largest batch size.",
    )
    score: Literal["l1", "l2", "taylor", "bn_scale", "lamp", "activation"] = Field(
        default="l2", description="What ranks the channels: their weights, gradients, batch-norm scales or activations."
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="Remove the share in every layer, or rank all layers' channels together."
    )
    round_to: int = Field(default=1, ge=1, description="Keep a multiple of this many channels in each layer.")
    exclude: tuple[str, ...] = options.EXCLUDED_LAYERS
    cuts: int = Field(default=1, ge=1, le=100, description="In how many equal steps the share is removed.")
    heal_epochs: int = Field(default=0, ge=0, description="Epochs of training after each cut.")
    learning_rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate of that training."
    )


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the layers whose channels could be removed."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    layers = (_ConvNd, nn.Linear, nn.Embedding, nn.RNNBase)
    return [name for name, layer in module.named_modules() if isinstance(layer, layers)]


def needs(config: Channels) -> tuple[str, ...]:
    """Return what the score and the training read of the workload."""
    if config.score == "taylor":
        return ("training", "loss")
    calibration = ("calibration",) if config.score == "activation" else ()
    return (*calibration, "training") if config.heal_epochs else calibration


def apply(config: Channels, module: "nn.Module", context: "Context") -> "nn.Module":
    """Remove `config.ratio` of the channels, or of the cost, of `module`, in place, and return it.

    Whether a group of channels may go is tried on a copy: some of its units are set to zero, then removed, and the
    model's outputs must stay what they were. What is visible from outside, or written into the model's code, is thereby
    found and left alone. The units that are chosen in the end are tried in the same way before they go.

    Raises:
        NoEffect: no layer is left that may be pruned, a glob matches none, or the cost cannot be brought down so far.
        BadModel: the dependency graph cannot be built for this architecture, or training diverged.
        BadGraph: the latency is asked for and the model cannot be exported.
    """
    from optimize.methods.prune import observe
    from optimize.methods.prune.groups import trial
    from optimize.model.copies import copied
    from optimize.train import fit as train

    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    inputs = observe.example(context.workload, SAMPLES)
    free = _free(config, module, inputs, context)
    sizes = {group.name: group.units for group in trial.groups(module, inputs)}
    original = copied(module)
    for number in range(1, config.cuts + 1):
        ranked = _rank(config, module, inputs, {name: sizes[name] for name in free}, context)
        so_far = replace(config, ratio=config.ratio * number / config.cuts)
        _cut(so_far, module, original, ranked, inputs, context)
        _freeze(module, frozen)
        if config.heal_epochs:
            module = train.fit(
                module,
                context,
                train.healing(context),
                name="prune.channels",
                epochs=config.heal_epochs,
                learning_rate=config.learning_rate,
            )
    return module


def _freeze(module: "nn.Module", frozen: list[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen and parameter.is_floating_point())


def _free(config: Channels, module: "nn.Module", inputs: "Inputs", context: "Context") -> list[str]:
    """Return the names of the groups that may be cut, and say which layers are left alone."""
    from optimize.methods.prune.groups import trial

    names, outputs = matches(module), context.workload.outputs
    excluded = globs.excluded(names, config.exclude)
    candidates = [group for group in trial.groups(module, inputs) if not {*excluded} & {*group.layers}]
    free = [group for group in candidates if trial.exact(module, {group.name: trial.some(group)}, inputs, outputs)]
    taken = {layer for group in free for layer in group.layers}
    alone = [name for name in names if name not in taken and name not in excluded]
    if not free:
        raise NoEffect(
            "prune.channels found no layer that it may prune",
            where=context.workload.name,
            fix=f"fixed by the model's outputs, its code or an excluded layer: {', '.join(alone) or 'none'}; "
            f"excluded: {', '.join(excluded) or 'none'}",
        )
    if alone:
        context.progress(
            f"prune.channels: left alone, for the outputs, the code or an excluded layer fix them: {', '.join(alone)}",
            0.0,
        )
    return sorted((group.name for group in free), key=names.index)


def _rank(
    config: Channels, module: "nn.Module", inputs: "Inputs", sizes: Mapping[str, int], context: "Context"
) -> "dict[str, Ranked]":
    from optimize.methods.prune import importance
    from optimize.methods.prune.groups import trial
    from optimize.methods.prune.ranking import Ranked

    salient = importance.saliency(config.score, module, context)
    groups = {group.name: group for group in trial.groups(module, inputs)}
    ranked = {}
    for name, size in sizes.items():
        scores = importance.rank(groups[name], config.score, salient)
        if scores is not None:
            ranked[name] = Ranked(scores, groups[name].parts, size)
    if not ranked:
        raise NoEffect(
            f"score {config.score!r} says nothing of the layers that may be pruned: {', '.join(sizes)}",
            where=context.workload.name,
            fix="use score = 'l2', which ranks any layer",
        )
    return ranked


def _cut(
    config: Channels,
    module: "nn.Module",
    original: "nn.Module",
    ranked: "Mapping[str, Ranked]",
    inputs: "Inputs",
    context: "Context",
) -> None:
    """Remove `config.ratio` of what there was before the first cut."""
    from optimize.methods.prune import cost, ranking
    from optimize.methods.prune.groups import trial
    from optimize.model.copies import copied

    def say(text: str) -> None:
        context.progress(f"prune.channels: {text}", 0.0)

    def cut(subject: "nn.Module", share: float) -> "nn.Module":
        chosen = ranking.choose(ranked, share, config.scope, config.round_to)
        trial.remove(subject, trial.sound(subject, chosen, inputs, context.workload.outputs, say), inputs)
        return subject

    share = config.ratio
    if config.of != "channels":
        share = cost.share(config.of, config.ratio, original, lambda share: cut(copied(module), share), context)
    cut(module, share)
