"""Module: a torch module as a predictor, and one call of it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from modelathe.errors import ModelatheError
from modelathe.tensors import TRITON_DTYPES, Array, Arrays
from optimize.model.attention import without_fast_path
from optimize.model.errors import BadModel, first_line


@contextmanager
def answering() -> Iterator[None]:
    """Run a module for its answers alone: without gradients, and without torch's fused paths, which an export lacks.

    Not in inference mode: a tensor that the module keeps of a call must serve a training and an export later.
    """
    with torch.no_grad(), without_fast_path():
        yield


def forward(module: nn.Module, inputs: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Call `module` with its inputs by name and return its outputs under the workload's names.

    Raises:
        BadModel: the model does not take these inputs, or returns something else than the declared tensors.
    """
    try:
        returned = module(**inputs)
    except (ModelatheError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also a model that wants the process to exit
        shapes = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in inputs.items())
        raise BadModel(
            f"does not take its inputs ({shapes}): {type(error).__name__}: {first_line(error)}",
            where=type(module).__name__,
            fix="let the workload's inputs name the arguments of forward, with the dtypes and shapes that it takes",
        ) from error
    return _named(returned, names, type(module).__name__)


def _named(returned: Any, names: Sequence[str], where: str) -> dict[str, torch.Tensor]:
    fix = "name every returned tensor in the workload's outputs, or wrap the model in a module that returns only those"
    if isinstance(returned, torch.Tensor):
        returned = (returned,)
    if isinstance(returned, Mapping):
        if set(returned) != set(names):
            raise BadModel(
                f"returns a dict with {sorted(map(str, returned))}, outputs says {list(names)}", where=where, fix=fix
            )
        returned = tuple(returned[name] for name in names)
    if not isinstance(returned, tuple | list) or not all(isinstance(item, torch.Tensor) for item in returned):
        raise BadModel(f"returns {type(returned).__name__}, not tensors", where=where, fix=fix)
    if len(returned) != len(names):
        raise BadModel(
            f"returns {len(returned)} unnamed tensors, outputs names {len(names)}: {', '.join(names)}",
            where=where,
            fix=fix,
        )
    for name, tensor in zip(names, returned, strict=True):
        _check_sendable(name, tensor, where)
    return dict(zip(names, returned, strict=True))


def _check_sendable(name: str, tensor: torch.Tensor, where: str) -> None:
    if tensor.layout != torch.strided:
        raise BadModel(
            f"output {name!r} is sparse, which no server sends", where=where, fix="end forward with .to_dense()"
        )
    # The 16 bits of a training in mixed precision are not the model's own.
    known = torch.is_autocast_enabled(tensor.device.type) or str(tensor.dtype).removeprefix("torch.") in TRITON_DTYPES
    if not known:
        raise BadModel(
            f"output {name!r} is {str(tensor.dtype).removeprefix('torch.')}, which no server sends",
            where=where,
            fix="end forward with .float() or torch.view_as_real",
        )


class TorchPredictor:
    """A torch module on the CPU, in evaluation mode."""

    def __init__(self, module: nn.Module, outputs: Sequence[str]) -> None:
        self.name = "torch"
        self._module, self._outputs = module.eval(), outputs

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the module's outputs for one batch."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with answering():
            outputs = forward(self._module, tensors, self._outputs)
        return {name: tensor.detach().resolve_neg().numpy() for name, tensor in outputs.items()}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held open."""
