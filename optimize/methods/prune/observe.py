"""Observe: run a model on data and watch its layers, and choose layers by globs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from optimize.model.attention import without_fast_path
from optimize.model.errors import NoEffect
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


def example(workload: Workload) -> dict[str, torch.Tensor]:
    """Return the first two evaluation samples as tensors by name."""
    batch = next(iter(workload.batches("evaluation")))
    return {name: torch.from_numpy(array[:2].copy()) for name, array in batch.inputs.items()}


def excluded(names: Sequence[str], globs: Sequence[str]) -> set[str]:
    """Return those of `names` that match one of the globs.

    Raises:
        NoEffect: a glob matches none.
    """
    for pattern in globs:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise NoEffect(
                f"exclude: no layer matches {pattern!r}", fix=f"the layers are: {', '.join(names) or 'none'}"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in globs)}
