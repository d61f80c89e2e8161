"""MACs: the multiply-accumulate operations of a model, counted operator by operator while it runs once.

Counted are matrix products, convolutions, recurrent layers and attention; what is added or compared alone is not.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from modelathe.tensors import TensorSpec, generated
from optimize.predict.module import answering, call_with
from optimize.source.workload import fewest

UNKNOWN = "the MACs are not known: torch's counter cannot follow this model"


def total(module: nn.Module, inputs: Sequence[TensorSpec]) -> int | None:
    """Return the MACs for one sample of typical size; None where torch cannot count them."""
    counted = by_module(module, inputs)
    return None if counted is None else sum(counted.values())


def by_module(module: nn.Module, inputs: Sequence[TensorSpec]) -> dict[str, int] | None:
    """Return the MACs of each module that has some, without those of the modules in it; the model itself is ''.

    They are those of one sample, from a call with the fewest samples that are declared. None where torch cannot count.
    """
    few = fewest(inputs)
    arrays = {name: torch.from_numpy(array) for name, array in generated(inputs, few).items()}
    # Operators of the CPU that torch's counter does not know. GRU and RNN are unrolled into matrix products.
    known: Any = {
        torch.ops.aten.mkldnn_rnn_layer: _recurrent,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    counter = FlopCounterMode(display=False, custom_mapping=known)
    try:
        with answering(), counter:
            call_with(module.eval(), arrays)
    except Exception:  # the module runs without the counter, or it would have no export
        return None
    finally:
        # A torch.cond that ran under the counter is never compiled again, and then fails.
        torch.compiler.reset()
    root = type(module).__name__
    totals = {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2 // few
        for name, counts in counter.get_flop_counts().items()
        if name.partition(".")[0] == root
    }
    children: dict[str, int] = defaultdict(int)
    for name in filter(None, totals):
        above = name.rpartition(".")[0]
        while above and above not in totals:  # a ModuleList is never called itself
            above = above.rpartition(".")[0]
        children[above] += totals[name]
    return {name: count - children[name] for name, count in totals.items() if count > children[name]}


def _recurrent(
    inputs: Sequence[int], from_input: Sequence[int], from_hidden: Sequence[int], *_rest: object, **_named: object
) -> int:
    """Count one layer in one direction from the shapes of its input (time, batch, width) and of its two weights."""
    return 2 * inputs[0] * inputs[1] * (math.prod(from_input) + math.prod(from_hidden))


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_rest: object, **_named: object) -> int:
    """Count both products of all heads from the shapes (batch, heads, length, width)."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
