"""Sparse: which entries of a weight go, as masks over matrices, and how the others make up for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optimize.methods.prune import observe
from optimize.source import padding
from optimize.source.workload import Workload

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
BLOCK = 128
"""Columns between two updates of all columns behind them."""
DAMPING = 0.01
"""Share of the mean of xᵀx's diagonal that is added to it, so that it can be inverted."""


def matrix(layer: Layer) -> Tensor:
    """Return the layer's weight as [groups, rows, columns]; neighbouring columns are neighbouring input channels."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    return weight.movedim(1, -1).reshape(groups, weight.shape[0] // groups, -1)


def set_matrix(layer: Layer, values: Tensor) -> None:
    """Write into the layer's weight, in place, what `matrix` would return."""
    shape = layer.weight.shape
    with torch.no_grad():
        # A clone, since `values` may be a view of this very weight.
        layer.weight.copy_(values.clone().reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1))


def grams(module: nn.Module, names: Sequence[str], workload: Workload) -> dict[int, Tensor]:
    """Return xᵀx [groups, columns, columns] of each layer's inputs x over the calibration data, by the weight's id.

    Layers that share a weight share the sum; a layer that is never run is not in it.
    """
    sums: dict[int, Tensor] = {}

    def watch(where: Tensor | None) -> observe.Hook:
        def hook(layer: Any, args: Any, named: Any, _made: Any) -> None:
            x = columns(layer, args[0] if args else named["input"], where)
            gram = x.transpose(1, 2) @ x
            sums[id(layer.weight)] = gram + sums.get(id(layer.weight), 0)

        return hook

    for inputs, where in padding.calibration(workload):
        observe.run(module, [inputs], workload.outputs, dict.fromkeys(names, watch(where)))
    return sums


def columns(layer: Layer, x: Tensor, where: Tensor | None = None) -> Tensor:
    """Return [groups, samples, columns]: what the columns of the layer's matrix are multiplied with.

    Args:
        layer: as it is.
        x: its input.
        where: from `padding.tokens`; padding is left out.
    """
    if isinstance(layer, nn.Linear):
        return padding.kept(x, where).reshape(1, -1, x.shape[-1])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    sizes = [layer.kernel_size, layer.dilation, layer.stride]
    if isinstance(layer, nn.Conv1d):
        x, sizes = x.unsqueeze(-2), [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    patches = functional.unfold(x, kernel, dilation, stride=stride)
    patches = patches.reshape(len(x), layer.groups, x.shape[1] // layer.groups, -1, patches.shape[-1])
    # [groups, samples, places, columns]
    placed = patches.permute(1, 0, 4, 3, 2).flatten(3)
    if where is not None and isinstance(layer, nn.Conv1d) and placed.shape[1:3] == where.shape:
        return placed[:, where]
    return placed.flatten(1, 2)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return a bool mask of the `count` lowest along the last axis; of equal ones the first."""
    gone = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, gone, True)


def pattern_mask(scores: Tensor, kept: int, of: int) -> Tensor:
    """Return a bool mask of what goes, so that of every `of` neighbours on the last axis the `kept` highest stay."""
    return lowest(scores.reshape(*scores.shape[:-1], -1, of), of - kept).view_as(scores)


def reconstruct(weight: Tensor, gram: Tensor, ratio: float, pattern: tuple[int, int] | None) -> Tensor:
    """Return `weight` with entries at zero and the others changed so that its products stay close: SparseGPT.

    Frantar and Alistarh (arXiv 2301.00774), algorithm 1: columns from left to right; an entry is ranked by its square
    over that of the inverse Hessian's diagonal, and its loss is spread over the columns to its right.

    Args:
        weight: float [rows, columns].
        gram: float [columns, columns]: xᵀx of the inputs.
        ratio: share that goes, within each block of columns.
        pattern: (n, m) to keep n of every m neighbours instead.
    """
    new, hessian = weight.double().clone(), gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    new[:, dead] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, new.shape[1], BLOCK):
        end = min(start + BLOCK, new.shape[1])
        block, own = new[:, start:end], inverse[start:end, start:end]
        errors = torch.zeros_like(block)
        gone = torch.zeros_like(block, dtype=torch.bool)
        if pattern is None:
            scores = (block / own.diagonal()).square()
            gone = lowest(scores.flatten(), round(ratio * scores.numel())).view_as(scores)
        for column in range(end - start):
            if pattern and column % pattern[1] == 0:
                ahead = slice(column, column + pattern[1])
                gone[:, ahead] = pattern_mask((block[:, ahead] / own.diagonal()[ahead]).square(), *pattern)
            kept = block[:, column].masked_fill(gone[:, column], 0)
            errors[:, column] = (block[:, column] - kept) / own[column, column]
            block[:, column:] -= errors[:, column : column + 1] * own[column, column:]
            block[:, column] = kept
        new[:, end:] -= errors @ inverse[start:end, end:]
    return new.to(weight.dtype)
