"""Observe: run a model on data and watch its layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from optimize.model.attention import without_fast_path
from optimize.predict.module import forward
from optimize.source.workload import Workload

Hook = Callable[[nn.Module, Any, Any, Any], None]
"""Called with the layer, its positional and its named arguments, and what it returned."""


@contextmanager
def watching(module: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Call each hook whenever the submodule of its name was run."""
    handles = [module.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        with without_fast_path():
            yield
    finally:
        for handle in handles:
            handle.remove()


def run(
    module: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], names: Sequence[str], hooks: Mapping[str, Hook]
) -> list[dict[str, torch.Tensor]]:
    """Return the outputs of `module`, in evaluation mode, for each batch, while `hooks` watch."""
    module.eval()
    with torch.no_grad(), watching(module, hooks):
        return [forward(module, batch, names) for batch in batches]


def example(workload: Workload, samples: int = 2) -> dict[str, torch.Tensor]:
    """Return the first evaluation samples as tensors by name."""
    return {name: torch.from_numpy(array[:samples].copy()) for name, array in workload.first().items()}
