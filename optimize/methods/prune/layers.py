"""prune.layers: depth. Whole blocks of a stack are taken out, and their input goes on in their place.

`similarity` is the block influence of Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than
You Expect" (arXiv 2403.03853): one minus the mean cosine of what a block is given and what it returns. `spread` takes
the blocks that stay at even distances, as Sanh et al. initialise DistilBERT (arXiv 1910.01108).
"""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.model.errors import BadModel, BadRecipe, NoEffect

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.step.contract import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Layers:
    """Remove whole blocks of a stack."""

    remove: int = Field(default=1, ge=1, description="How many blocks are removed.")
    keep: tuple[int, ...] = Field(
        default=(), description="Blocks that stay, counted from 0; instead of choosing them by remove and score."
    )
    container: str = Field(
        default="",
        description="Glob on the name of the ModuleList or Sequential that holds the blocks; by default the blocks "
        "are the modules of the type that is most frequent in these.",
    )
    score: Literal["similarity", "spread"] = Field(
        default="similarity",
        description="Which blocks go: those that change their input least (needs calibration), or evenly spaced ones.",
    )


def needs(config: Layers) -> tuple[str, ...]:
    """Return which data the score is taken from."""
    return ("calibration",) if config.score == "similarity" and not config.keep else ()


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the blocks that could be removed."""
    return _blocks(module, "")


def apply(config: Layers, module: "nn.Module", context: "Context") -> "nn.Module":
    """Put an `optimize.model.structure.Skip` in the place of each block that goes, in place, and return `module`.

    Raises:
        NoEffect: there are no blocks, or the model does not run without the one that `keep` leaves out.
        BadRecipe: `keep` or `remove` does not fit the blocks.
    """
    blocks = _blocks(module, config.container)
    if not blocks:
        raise NoEffect(
            f"prune.layers found no blocks in {config.container or 'any ModuleList or Sequential'}",
            where=context.workload.name,
            fix=f"set container to a glob that matches one of: {', '.join(_containers(module)) or 'none here'}; "
            "a block that stands in several places counts once",
        )
    skips, fixed = _skips(module, blocks, context)
    gone = _left_out(config.keep, blocks, fixed) if config.keep else _chosen(config, module, skips, fixed, context)
    for name in gone:
        module.set_submodule(name, skips[name])
    context.progress(f"prune.layers: removed {', '.join(gone)}", 1)
    return module


def _containers(module: "nn.Module") -> list[str]:
    from torch import nn

    return [name for name, layer in module.named_modules() if isinstance(layer, nn.ModuleList | nn.Sequential)]


def _blocks(module: "nn.Module", container: str) -> list[str]:
    """Return the names of the blocks, in the order of the model's modules."""
    children = {
        f"{name}.{key}".removeprefix("."): child
        for name in _containers(module)
        if not container or fnmatchcase(name, container)
        for key, child in module.get_submodule(name).named_children()
    }
    if container:
        return [name for name, child in children.items() if any(True for _ in child.parameters())]
    kinds = Counter(type(child) for child in children.values() if any(True for _ in child.children()))
    kind, count = next(iter(kinds.most_common(1)), (None, 0))
    return [name for name, child in children.items() if type(child) is kind] if count > 1 else []


def _skips(
    module: "nn.Module", blocks: Sequence[str], context: "Context"
) -> "tuple[dict[str, nn.Module], dict[str, str]]":
    """Return what can stand in for each block that can go, and for each other one why it cannot, both by running."""
    from optimize.methods.prune import observe
    from optimize.model.structure import Skip

    outputs = context.workload.outputs
    inputs = observe.example(context.workload)
    seen: dict[str, tuple[Any, Any]] = {}

    def watch(name: str) -> observe.Hook:
        return lambda _layer, args, named, out: seen.update({name: (_first(args, named), out)})

    (whole,) = observe.run(module, [inputs], outputs, {name: watch(name) for name in blocks})
    skips: dict[str, nn.Module] = {}
    fixed: dict[str, str] = {}
    for name in blocks:
        given, made = seen.get(name, (None, None))
        returned = made[0] if isinstance(made, tuple) else made
        shapes = [getattr(x, "shape", None) for x in (given, returned)]
        if None in shapes or shapes[0] != shapes[1]:
            fixed[name] = "it does not return the shape that it is given" if name in seen else "it is not run"
            continue
        block, skip = module.get_submodule(name), Skip(isinstance(made, tuple)).eval()
        module.set_submodule(name, skip)
        try:
            (cut,) = observe.run(module, [inputs], outputs, {})
        except BadModel:
            cut = {}
        if all(output in cut and cut[output].shape == whole[output].shape for output in outputs):
            skips[name] = skip
        else:
            fixed[name] = "the model's code does not run without it"
        module.set_submodule(name, block)
    return skips, fixed


def _left_out(keep: Sequence[int], blocks: Sequence[str], fixed: dict[str, str]) -> list[str]:
    """Return the blocks that are not in `keep`."""
    gone = [name for number, name in enumerate(blocks) if number not in keep]
    if not set(keep) <= set(range(len(blocks))) or not gone:
        listed = ", ".join(f"{number} = {name}" for number, name in enumerate(blocks))
        raise BadRecipe(
            f"keep = {list(keep)} cannot be", where="prune.layers", fix=f"keep some but not all of {listed}"
        )
    for name in gone:
        if name in fixed:
            raise NoEffect(f"{name} cannot be removed: {fixed[name]}", where="prune.layers", fix="keep it too")
    return gone


def _chosen(
    config: Layers, module: "nn.Module", skips: "dict[str, nn.Module]", fixed: dict[str, str], context: "Context"
) -> list[str]:
    """Return the `config.remove` blocks that matter least."""
    free = list(skips)
    if config.remove > min(len(free), len(free) + len(fixed) - 1):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in fixed.items())
        raise BadRecipe(
            f"remove = {config.remove} of {len(free) + len(fixed)} blocks cannot be",
            where="prune.layers",
            fix=f"one must stay{', and some cannot go: ' if fixed else ''}{reasons}",
        )
    if config.score == "spread":
        count = len(free) - config.remove
        kept = {int(number * (len(free) - 1) / max(count - 1, 1) + 0.5) for number in range(count)}
        return [name for number, name in enumerate(free) if number not in kept]
    influence = _influence(module, free, context)
    context.progress("prune.layers: " + ", ".join(f"{name} {value:.4f}" for name, value in influence.items()), 0.0)
    return sorted(free, key=lambda name: influence[name])[: config.remove]


def _influence(module: "nn.Module", names: Sequence[str], context: "Context") -> dict[str, float]:
    """Return one minus the mean cosine of input and output of each block over the calibration data, without padding.

    Vectors are compared along the last axis, and in feature maps of four or five axes along the channels.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    from optimize.methods.prune import observe
    from optimize.source import padding

    cosines: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str, where: "Tensor | None") -> observe.Hook:
        def hook(_layer: "nn.Module", args: Any, named: Any, made: Any) -> None:
            pair = (_first(args, named), made[0] if isinstance(made, tuple) else made)
            maps = pair[0].dim() > 3
            given, returned = pair if maps else (padding.kept(values, where) for values in pair)
            cosines[name].append(cosine_similarity(given, returned, dim=1 if maps else -1).double().flatten())

        return hook

    for inputs, where in padding.calibration(context.workload):
        observe.run(module, [inputs], context.workload.outputs, {name: watch(name, where) for name in names})
    return {name: 1 - torch.cat(values).mean().item() for name, values in cosines.items()}


def _first(args: Sequence[Any], named: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(named.values()), None)
