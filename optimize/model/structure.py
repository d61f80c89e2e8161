"""Structure: what differs between a treated model and the one that the user's code builds, as plain data.

A bundle keeps this record beside the weights, so that a pruned model is rebuilt without pickling anything.
"""

from typing import Any

import torch
from torch import nn

from optimize.model.attention import Attention, substitute
from optimize.model.copies import computes, copied, folded
from optimize.model.errors import BadBundle


class Skip(nn.Module):
    """Stands in the place of a removed layer and returns its first input, so that other layers keep their names.

    Args:
        as_tuple: return `(input,)`, for a layer that returned a tuple.
    """

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the first input, whatever else comes with it."""
        first = args[0] if args else next(iter(named.values()))
        return (first,) if self.as_tuple else first


def structure(module: nn.Module, original: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what differs in shape between two versions of one model.

    For each submodule with a difference: `skipped`, whether a removed layer returned a tuple; or `tensors`, the shape
    of each parameter or buffer that has another one, and `attributes`, the whole numbers and tuples of them (such as
    `out_channels`) that have another value; with `substituted` where an `Attention` stands in for torch's own. Under
    the model's own name, '', `folded` says that its computed weights have become plain ones.
    """
    record: dict[str, dict[str, Any]] = {}
    original = copied(original)
    plain = computes(original) and not computes(module)
    if plain:
        original = folded(original)
    for name, layer in module.named_modules():
        other = original.get_submodule(name)
        if isinstance(layer, Skip) and not isinstance(other, Skip):
            record[name] = {"skipped": layer.as_tuple}
            continue
        substituted = isinstance(layer, Attention) and not isinstance(other, Attention)
        if substituted:
            other = substitute(original, name)
        tensors = {
            key: list(tensor.shape)
            for key, tensor in _tensors(layer).items()
            if tensor.shape != _tensors(other)[key].shape
        }
        attributes = {
            key: value for key, value in vars(layer).items() if _is_size(value) and vars(other).get(key, value) != value
        }
        if tensors or attributes or substituted:
            record[name] = {"tensors": tensors, "attributes": attributes}
            if substituted:
                record[name]["substituted"] = True
    if plain:
        record[""] = {"tensors": {}, "attributes": {}, **record.get("", {}), "folded": True}
    return record


def rebuild(module: nn.Module, record: dict[str, dict[str, Any]], where: str) -> nn.Module:
    """Return a fresh model with the structure of `record`, itself unless it is folded.

    The values of resized tensors are NaN, or 0.

    Raises:
        BadBundle: the model has no such submodule or tensor.
    """
    if "folded" in record.get("", {}):
        module = folded(module)
    # A tensor that several layers share stays shared.
    fresh: dict[int, torch.Tensor] = {}
    for name, change in record.items():
        try:
            if "skipped" in change:
                module.get_submodule(name)
                module.set_submodule(name, Skip(change["skipped"]))
                continue
            layer = substitute(module, name) if "substituted" in change else module.get_submodule(name)
            for key, shape in change["tensors"].items():
                _resize(layer, key, shape, fresh)
        except (AttributeError, KeyError) as error:
            raise BadBundle(
                f"the workload's model has no {name!r} as the bundle knew it",
                where=where,
                fix="bring the workload file back to what it was, or make the bundle again",
            ) from error
        for key, value in change["attributes"].items():
            setattr(layer, key, tuple(value) if isinstance(value, list) else value)
    return module


def unsaved(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that `state_dict()` leaves out, by their full names: those with `persistent=False`."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in saved}


def _resize(layer: nn.Module, key: str, shape: list[int], fresh: dict[int, torch.Tensor]) -> None:
    old = _tensors(layer)[key]
    if id(old) not in fresh:
        blank = torch.full(shape, float("nan") if old.is_floating_point() else 0, dtype=old.dtype)
        fresh[id(old)] = nn.Parameter(blank) if isinstance(old, nn.Parameter) else blank
        # Kept alive, so that no other tensor gets its id.
        fresh[id(fresh[id(old)])] = old
    setattr(layer, key, fresh[id(old)])


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    own = {**layer._parameters, **layer._buffers}
    return {key: tensor for key, tensor in own.items() if tensor is not None}


def _is_size(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_size(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)
