"""prune.weights: single weights of linear layers and convolutions become zero; every shape stays.

Scores: `magnitude` (Han et al., arXiv 1506.02626); `wanda`, the magnitude times the norm of the weight's input, ranked
within each output (Sun et al., arXiv 2306.11695); `sparsegpt`, which also changes the weights that stay (Frantar and
Alistarh, arXiv 2301.00774). The inputs are those of the model as it comes, not of the layers pruned before.
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

    from optimize.methods.prune.sparse import Layer
    from optimize.step.contract import Context


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Weights:
    """Set single weights to zero.

    The ONNX file keeps its size, and ONNX Runtime multiplies zeros like any other number, so neither gains. Who gains:
    TensorRT on GPUs with sparse tensor cores, from pattern 2:4; and whatever compresses the file. A training step
    that follows fills the zeros again.
    """

    ratio: float = Field(default=0.5, gt=0, lt=1, description="Share that is removed; not used with a pattern.")
    pattern: Literal["", "2:4", "4:8"] = Field(
        default="",
        description="Keep N of every M weights along the input channels, as N:M. TensorRT gains from 2:4; ONNX Runtime "
        "gains from no zeros, and the file keeps its size.",
    )
    score: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        default="magnitude", description="What ranks the weights; wanda and sparsegpt need calibration."
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="Remove the share in every layer, or rank all layers together (magnitude)."
    )
    exclude: tuple[str, ...] = options.EXCLUDED_LAYERS

    @field_validator("scope")
    @classmethod
    def _global_only_by_magnitude(cls, scope: str, values: ValidationInfo) -> str:
        if scope == "global" and (values.data.get("score") != "magnitude" or values.data.get("pattern")):
            raise PydanticCustomError("scope", "global goes with the score magnitude and without a pattern")
        return scope


def needs(config: Weights) -> tuple[str, ...]:
    """Return which data the score is taken from."""
    return () if config.score == "magnitude" else ("calibration",)


def matches(module: "nn.Module") -> list[str]:
    """Return the names of the layers whose weights could become zero, as they are called when it is done."""
    from optimize.model.attention import substitute_all
    from optimize.model.copies import copied

    return _layers(substitute_all(copied(module)))


def apply(config: Weights, module: "nn.Module", context: "Context") -> "nn.Module":
    """Set weights of `module` to zero, in place, and return it.

    An `nn.MultiheadAttention` becomes an `optimize.model.attention.Attention`, whose layers can be pruned one by one.
    Left alone are a weight that is also an embedding, for wanda and sparsegpt a layer that no calibration sample
    reaches, and for a pattern a layer whose input channels are no multiple of it.

    Raises:
        NoEffect: no layer is left that may be pruned.
    """
    from optimize.methods.prune import sparse
    from optimize.model.attention import substitute_all

    module = substitute_all(module)
    names = _layers(module)
    excluded = globs.excluded(names, config.exclude)
    free = [name for name in names if name not in excluded]
    sums = sparse.grams(module, free, context.workload) if needs(config) else None
    pattern = _pattern(config)
    unfit = {
        name
        for name in free
        if (pattern and _layer(module, name).weight.shape[1] % pattern[1])
        or (sums is not None and id(_layer(module, name).weight) not in sums)
        or _is_embedding(module, name)
    }
    # One entry for each weight, however many layers use it.
    chosen = {id(_layer(module, name).weight): _layer(module, name) for name in free if name not in unfit}
    if not chosen:
        raise NoEffect(
            "prune.weights found no layer that it may prune",
            where=context.workload.name,
            fix=f"not fit (tied to an embedding, never run, or no multiple of the pattern): "
            f"{', '.join(sorted(unfit)) or 'none'}; excluded: {', '.join(sorted(excluded)) or 'none'}",
        )
    if unfit:
        context.progress(f"prune.weights: left alone: {', '.join(sorted(unfit))}", 0)
    if config.scope == "global":
        _prune_together(config.ratio, list(chosen.values()))
    else:
        for number, (key, layer) in enumerate(chosen.items()):
            sparse.set_matrix(layer, _pruned(config, sparse.matrix(layer), sums[key] if sums else None))
            context.progress(f"prune.weights: {number + 1} of {len(chosen)} layers", (number + 1) / len(chosen))
    return module


def _pruned(config: Weights, matrices: "Tensor", grams: "Tensor | None") -> "Tensor":
    """Return `matrices` [groups, rows, columns] with their share of zeros."""
    import torch

    from optimize.methods.prune import sparse

    pattern = _pattern(config)
    if config.score == "sparsegpt":
        assert grams is not None
        pairs = zip(matrices, grams, strict=True)
        return torch.stack([sparse.reconstruct(weight, gram, config.ratio, pattern) for weight, gram in pairs])
    scores = matrices.abs()
    if grams is not None:
        scores = scores * grams.diagonal(dim1=1, dim2=2).sqrt()[:, None, :]
    if pattern:
        return matrices.masked_fill(sparse.pattern_mask(scores, *pattern), 0)
    # By output for wanda, over the whole layer for the magnitude, as their authors have it.
    compared = scores if grams is not None else scores.reshape(1, 1, -1)
    gone = sparse.lowest(compared, round(config.ratio * compared.shape[-1]))
    return matrices.masked_fill(gone.view_as(matrices), 0)


def _prune_together(ratio: float, layers: "list[Layer]") -> None:
    import torch

    from optimize.methods.prune import sparse

    matrices = [sparse.matrix(layer) for layer in layers]
    everything = torch.cat([values.abs().flatten() for values in matrices])
    gone_of_all = sparse.lowest(everything, round(ratio * len(everything)))
    masks = torch.split(gone_of_all, [values.numel() for values in matrices])
    for layer, values, gone in zip(layers, matrices, masks, strict=True):
        sparse.set_matrix(layer, values.masked_fill(gone.view_as(values), 0))


def _layers(module: "nn.Module") -> list[str]:
    from torch import nn

    from optimize.methods.prune import sparse

    torchs = {name for name, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)}
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, sparse.Layer) and name.rpartition(".")[0] not in torchs
    ]


def _layer(module: "nn.Module", name: str) -> "Layer":
    from optimize.methods.prune import sparse

    layer = module.get_submodule(name)
    assert isinstance(layer, sparse.Layer)
    return layer


def _is_embedding(module: "nn.Module", name: str) -> bool:
    from torch import nn

    weight = _layer(module, name).weight
    return any(
        isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.weight is weight for layer in module.modules()
    )


def _pattern(config: Weights) -> tuple[int, int] | None:
    kept, _, of = config.pattern.partition(":")
    return (int(kept), int(of)) if of else None
