"""prune.heads: attention heads, and neurons of the feed-forward blocks, of transformer encoders.

Michel et al., "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), whose importance of a head, the loss's
sensitivity to scaling its output, is the score `taylor` here, for neurons as well.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from optimize.model import globs
from optimize.model.errors import NoEffect
from optimize.step import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optimize.methods.prune.units import Units
    from optimize.step.contract import Context

BATCHES = 32
"""Training batches that a gradient is averaged over, drawn from a whole epoch."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Heads:
    """Remove attention heads, and neurons of feed-forward blocks, that matter least."""

    ratio: float = Field(
        default=0.5, ge=0, lt=1, description="Share that is removed: of the heads of each attention; 0 leaves them."
    )
    ffn: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        validate_default=True,
        description="Share of the neurons of each feed-forward block that is removed.",
    )
    score: Literal["l2", "taylor"] = Field(
        default="l2", description="What ranks them: norm of the weights, or the loss's sensitivity (needs training)."
    )
    round_to: int = Field(
        default=1, ge=1, description="Keep a multiple of this many channels, of the neurons of a feed-forward block."
    )
    exclude: tuple[str, ...] = options.EXCLUDED_LAYERS

    @field_validator("ffn")
    @classmethod
    def _something_is_removed(cls, ffn: float, values: ValidationInfo) -> float:
        if not ffn and values.data.get("ratio") == 0:
            raise PydanticCustomError("ffn", "ratio is 0 too, and one of them must be above 0")
        return ffn


def needs(config: Heads) -> tuple[str, ...]:
    """Return which data the score is taken from."""
    return ("training", "loss") if config.score == "taylor" else ()


def matches(module: "nn.Module") -> list[str]:
    """Return the names of what looks like an attention, and of the first layer of what looks like a feed-forward."""
    from torch import nn

    from optimize.methods.prune import units
    from optimize.model.attention import is_plain

    torchs = [
        name for name, x in module.named_modules() if name and isinstance(x, nn.MultiheadAttention) and is_plain(x)
    ]
    return [*torchs, *units.attentions(module), *units.feed_forwards(module)]


def apply(config: Heads, module: "nn.Module", context: "Context") -> "nn.Module":
    """Remove heads and neurons of `module`, in place, and return it.

    Each attention keeps at least one head. An `nn.MultiheadAttention` becomes an `optimize.model.attention.Attention`.
    What the model's code needs at its size is found by trying, and left alone.

    Raises:
        NoEffect: nothing is left that may be removed, or the shares are less than one head or neuron.
    """
    from optimize.methods.prune import observe, units
    from optimize.model.attention import substitute_all

    excluded = globs.excluded(matches(module), config.exclude)
    if config.ratio:
        module = substitute_all(module)
    inputs = observe.example(context.workload)
    chosen: list[tuple[Units, int]] = []
    for what, share, found in (
        ("attention", config.ratio, units.attentions(module)),
        ("feed-forward block", config.ffn, units.feed_forwards(module)),
    ):
        if not share:
            continue
        free = {name: readings for name, readings in found.items() if name not in excluded}
        proven = [units.proven(module, readings, inputs, context.workload.outputs) for readings in free.values()]
        usable = [made for made in proven if made]
        fixed = [name for name, made in zip(free, proven, strict=True) if not made]
        if not usable:
            raise _nothing(what, fixed, sorted(excluded), context.workload.name)
        if fixed:
            context.progress(
                f"prune.heads: {what} fixed by the model's code or by shared weights, left alone: {', '.join(fixed)}", 0
            )
        round_to = config.round_to if what != "attention" else 1
        chosen += [(made, _kept(made.count, share, round_to)) for made in usable]
    if all(kept == made.count for made, kept in chosen):
        raise NoEffect(
            f"prune.heads would remove less than one of {', '.join(str(made.count) for made, _ in chosen) or 'none'}",
            where=context.workload.name,
            fix="raise ratio or ffn",
        )
    scores = _scores(config, module, [made for made, _ in chosen], context)
    for (made, kept), score in zip(chosen, scores, strict=True):
        units.remove(module, made, sorted(score.argsort(descending=True, stable=True)[:kept].tolist()))
    return module


def _kept(count: int, share: float, multiple: int) -> int:
    """Return how many stay: the nearest multiple, at least one of it, at most all."""
    return min(count, max(1, round(count * (1 - share) / multiple)) * multiple)


def _nothing(what: str, fixed: list[str], excluded: list[str], where: str) -> NoEffect:
    return NoEffect(
        f"prune.heads found no {what} that it may prune",
        where=where,
        fix="an attention has linear layers for query, key and value (or one for all three) and for its output, and "
        "an attribute such as num_heads, and takes the width of its heads from its layers; a feed-forward block is two "
        "neighbouring linear layers, the first widening. "
        f"Fixed by the model's code or by shared weights: {', '.join(fixed) or 'none'}; "
        f"excluded: {', '.join(excluded) or 'none'}",
    )


def _scores(config: Heads, module: "nn.Module", chosen: "list[Units]", context: "Context") -> "list[Tensor]":
    """Return, for each of `chosen`, float [units]: the larger, the more it matters."""
    return _sensitivities(module, chosen, context) if config.score == "taylor" else [_norms(module, x) for x in chosen]


def _norms(module: "nn.Module", units: "Units") -> "Tensor":
    """Return the norm of all weights that a unit has."""
    import torch

    squares = torch.zeros(units.count)
    for part in units.slices:
        tensor = getattr(module.get_submodule(part.layer), part.tensor).detach().float()
        lines = tensor.movedim(part.axis, 0).reshape(tensor.shape[part.axis], -1)
        squares += lines.square().sum(1)[part.rows].sum(1)
    return squares.sqrt()


def _sensitivities(module: "nn.Module", chosen: "list[Units]", context: "Context") -> "list[Tensor]":
    """Return the mean over batches of |∂loss/∂(scale of the unit's output)|, read from the columns behind it."""
    import torch

    from optimize.model.attention import without_fast_path
    from optimize.predict.module import forward
    from optimize.source import sample
    from optimize.train import fit as train

    totals = [torch.zeros(made.count) for made in chosen]
    weights = [module.get_parameter(f"{made.reader}.weight") for made in chosen]
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    module.eval()
    with without_fast_path():
        for inputs, targets in train.as_tensors(sample.batches(context.workload, "training", BATCHES, context.seed)):
            loss = train.label_loss(context.workload, forward(module, inputs, context.workload.outputs), targets)
            with train.backward(context.workload):
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
            for total, made, weight, gradient in zip(totals, chosen, weights, gradients, strict=True):
                total += (weight * gradient).detach().sum(0)[made.slices[-1].rows].sum(1).abs()
    for weight in frozen:
        weight.requires_grad_(False)
    return totals
