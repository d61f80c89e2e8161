"""Copies: of the user's module, which Python's own copying and torch's exporters do not always survive."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode

from optimize.model.errors import BadModel, first_line


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    A tensor that a computation has left on it, as the hooks of `weight_norm` and of torch's pruning masks do, is copied
    without its history. What Python cannot copy, such as a lock or an open file, both modules share.

    Raises:
        BadModel: a class of the user's refuses to be copied; names the submodule.
    """
    with _WithoutHistory():
        try:
            return copy.deepcopy(module)
        except Exception:  # whatever the user's own __deepcopy__ or __getstate__ raises
            memo = {id(thing): thing for thing in _uncopyable(module)}
        try:
            return copy.deepcopy(module, memo)
        except Exception as error:
            name = next(name for name, layer in reversed(list(module.named_modules())) if _fails(layer, memo))
            raise BadModel(
                f"{f'its {name!r}' if name else 'it'} cannot be copied: {type(error).__name__}: {first_line(error)}",
                where=type(module).__name__,
                fix="let copy.deepcopy(model) work, which the class's own __deepcopy__ or __getstate__ can see to",
            ) from error


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module itself that `torch.compile` or `nn.DataParallel` was put around."""
    while isinstance(module, (OptimizedModule, nn.DataParallel, DistributedDataParallel)):
        module = module._orig_mod if isinstance(module, OptimizedModule) else module.module
    return module


def computes(module: nn.Module) -> bool:
    """Return whether a weight of the module is computed from others, so that `folded` would change it."""
    return any(True for layer in module.modules() for _ in _folds(layer))


def folded(module: nn.Module) -> nn.Module:
    """Return a module whose computed weights are plain parameters, as exports and cuts need them.

    Parametrizations, the older hooks of `weight_norm` and `spectral_norm`, and the masks of `torch.nn.utils.prune` are
    replaced by the weight that they come to, in a copy: a training needs them. A module without any is returned itself.
    """
    if not computes(module):
        return module
    made = copied(module)
    for layer in list(made.modules()):
        for fold in list(_folds(layer)):
            fold()
    return made


class _WithoutHistory(TorchFunctionMode):
    """Lets tensors be copied that are results of a computation, which torch refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__ and (not args[0].is_leaf or args[0].is_inference()):
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def _uncopyable(module: nn.Module) -> Iterator[object]:
    """Yield the innermost things in a module's attributes that cannot be copied."""
    known: dict[int, Any] = {id(layer): layer for layer in module.modules()}
    seen: set[int] = set()
    for layer in module.modules():
        for value in vars(layer).values():
            yield from _inside(value, known, seen)


def _inside(thing: Any, known: dict[int, Any], seen: set[int]) -> Iterator[object]:
    if id(thing) in seen or id(thing) in known or not _fails(thing, known):
        return
    seen.add(id(thing))
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set) else ()
    parts = [*inner, *getattr(thing, "__dict__", {}).values()]
    yield from [part for value in parts for part in _inside(value, known, seen)] or [thing]


def _fails(thing: object, known: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(thing, {key: value for key, value in known.items() if value is not thing})
    except Exception:
        return True
    return False


def _folds(layer: nn.Module) -> Iterator[Callable[[], object]]:
    """Yield for each computed weight of a layer what puts a plain parameter in its place."""
    if parametrize.is_parametrized(layer):
        yield lambda: _unparametrize(layer)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield partial(remove_weight_norm, layer, hook.name)
        elif isinstance(hook, SpectralNorm):
            yield partial(remove_spectral_norm, layer, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            yield partial(prune.remove, layer, hook._tensor_name)


def _unparametrize(layer: Any) -> None:
    # torch's own way out takes the property from the class, which the copy shares with the module that it is a copy of.
    with torch.no_grad():
        values = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, value.is_floating_point()))
