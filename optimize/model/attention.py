"""Attention: `nn.MultiheadAttention` with a width for each head of its own, so that heads can be removed from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import transformer


class Attention(nn.Module):
    """Computes what an `nn.MultiheadAttention` computes, in four linear layers and with any number of heads.

    torch's own module fixes the width of a head to embed_dim / num_heads, so it cannot lose one. In place of it this
    one takes the same call, masks included, and gives the same numbers; it never takes torch's fused fast path.

    Args:
        source: the module whose weights are copied.

    Raises:
        ValueError: `source` has `bias_k` or `add_zero_attn`.
    """

    # Read by nn.TransformerEncoderLayer, which takes its fast path only where there is one.
    in_proj_bias = None

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if not is_plain(source):
            raise ValueError("bias_k and add_zero_attn have no place here")
        self.embed_dim, self.num_heads, self.head_dim = source.embed_dim, source.num_heads, source.head_dim
        self.batch_first, self.dropout = source.batch_first, source.dropout
        weights: list[Tensor] = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        if source.in_proj_weight is not None:
            weights = list(source.in_proj_weight.chunk(3))
        biases = [None] * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values and the weights, or None for these, as `nn.MultiheadAttention` does.

        Args:
            query: float [batch, targets, embed_dim]; without `batch_first` [targets, batch, …]; or without a batch.
            key: float, in the same order.
            value: float, in the same order.
            key_padding_mask: [batch, sources]: bool, True for what is left out, or float, added to the scores.
            need_weights: return [batch, targets, sources] as well.
            attn_mask: [targets, sources] or [batch * num_heads, targets, sources], bool or float likewise.
            average_attn_weights: the mean over the heads; otherwise [batch, num_heads, targets, sources].
            is_causal: a hint that `attn_mask`, which must come with it, is causal.
        """
        batched, swapped = query.dim() == 3, query.dim() == 3 and not self.batch_first
        given = [x if batched else x.unsqueeze(0) for x in (query, key, value)]
        if swapped:
            given = [x.transpose(0, 1) for x in given]
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._split(layer(x)) for layer, x in zip(layers, given, strict=True))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if swapped:
            output = output.transpose(0, 1)
        return output if batched else output.squeeze(0), weights

    def _split(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Return what is added to the scores [batch, heads, targets, sources]."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep torch's encoders from their fused path, which goes past the layers inside, so that these can be watched."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def without_mask_check() -> Iterator[None]:
    """Keep torch's encoders from looking whether a mask is causal, a branch on values that no exporter can follow.

    All that it decides is whether a faster product may be taken; the mask is applied either way.
    """
    look = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = look


def is_plain(source: nn.MultiheadAttention) -> bool:
    """Return whether `Attention` can stand in for it."""
    return source.bias_k is None and not source.add_zero_attn


def substitute(module: nn.Module, name: str) -> Attention:
    """Put an `Attention` in the place of the `nn.MultiheadAttention` called `name`, in place, and return it."""
    source: Any = module.get_submodule(name)
    made = Attention(source)
    for place in [place for place, layer in module.named_modules(remove_duplicate=False) if layer is source]:
        module.set_submodule(place, made)
    for ancestor in module.modules():
        if isinstance(ancestor, nn.TransformerEncoder) and any(layer is made for layer in ancestor.modules()):
            # Its own fast path reads weights that are no longer there, and hands on nested tensors.
            ancestor.use_nested_tensor = False
    return made


def substitute_all(module: nn.Module) -> nn.Module:
    """Put an `Attention` in the place of every `nn.MultiheadAttention` that it can stand in for, in place.

    All of them or none: a stack of which only some layers take the fast path hands nested tensors to the others.
    """
    sources = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)]
    for name, source in sources:
        if name and is_plain(source):
            substitute(module, name)
    return module


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
    made.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return made  # type: ignore[no-any-return]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
