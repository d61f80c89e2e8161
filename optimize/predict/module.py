"""Module: a torch module as a predictor, and one call of it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from modelathe.errors import ModelatheError
from modelathe.tensors import TRITON_DTYPES, Array, Arrays
from optimize.model import userline
from optimize.model.attention import without_fast_path
from optimize.model.errors import BadModel, first_line


@contextmanager
def answering() -> Iterator[None]:
    """Run a module for its answers alone: without gradients, and without torch's fused paths, which an export lacks.

    Not in inference mode: a tensor that the module keeps of a call must serve a training and an export later.
    """
    with torch.no_grad(), without_fast_path():
        yield


def by_argument(module: nn.Module, names: Sequence[str]) -> dict[str, str] | None:
    """Return which argument of the module's forward takes each input, in order; None where they go by position alone.

    An input goes to the argument of its name. Those left over go to the required arguments left over, in order, where
    there are as many of both, as for `nn.Sequential`, whose only argument is `input`.

    Args:
        module: its forward says what it takes.
        names: of the inputs, in the workload's order.
    """
    kinds = inspect.Parameter
    found = inspect.signature(getattr(module, "forward", module)).parameters.values()
    taken = {each.name: each for each in found if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    over = [name for name in names if name not in taken]
    if not over or any(each.kind is kinds.VAR_KEYWORD for each in found):
        return {name: name for name in names}
    if not taken and any(each.kind is kinds.VAR_POSITIONAL for each in found):
        return None
    free = [each for each in taken.values() if each.name not in names]
    required = [each.name for each in free if each.default is kinds.empty]
    if len(required) != len(over):
        return {name: name for name in names}  # forward itself then says what it misses
    placed = dict(zip(over, required, strict=True))
    return {name: placed.get(name, name) for name in names}


def arranged(
    module: nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Return what a call of the module is given by position and what by name; `inputs` are in the workload's order."""
    arguments = by_argument(module, [*inputs])
    if arguments is None:
        return tuple(inputs.values()), {}
    return (), {arguments[name]: tensor for name, tensor in inputs.items()}


def call_with(module: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """Call `module` with its inputs, which are in the workload's order, and return what it returns."""
    placed, named = arranged(module, inputs)
    return module(*placed, **named)


def forward(module: nn.Module, inputs: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Call `module` with its inputs and return its outputs under the workload's names.

    Raises:
        BadModel: the model does not take these inputs, or returns something else than the declared tensors.
    """
    try:
        returned = call_with(module, inputs)
    except (ModelatheError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also a model that wants the process to exit
        where, text = userline.of(error)
        said = f"{type(error).__name__}: {first_line(error)}{f' at `{text}`' if text else ''}"
        raise BadModel(
            f"does not take its inputs {userline.told(inputs)}: {said}",
            where=f"{type(module).__name__}{f', {where}' if where else ''}",
            fix="let the workload's inputs name the arguments of forward, with the dtypes and shapes that it takes",
        ) from error
    return named(returned, names, type(module).__name__)


def named(returned: Any, names: Sequence[str], where: str) -> dict[str, torch.Tensor]:
    """Return what a module returned under the names of its outputs.

    Raises:
        BadModel: it is something else than the declared tensors.
    """
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
