"""State: a module's parameters and buffers, each a whole tensor of its own, as they are checked, saved and loaded."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from optimize.model.errors import BadModel, BadWorkload

FLOAT_MODEL = "bring the float model, as it was before it was quantized; the quantize steps make INT8 of it"
EAGER = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""Where torch keeps the layers of its own quantization."""
PLAIN = (str, bytes, bytearray, int, float, complex, type, torch.dtype, torch.device, type(None))


def check(model: nn.Module, what: str, where: str) -> None:
    """Refuse what no step and no bundle can hold, by name.

    Raises:
        BadWorkload: the layer or tensor, and what to do about it.
    """
    for name, layer in model.named_modules():
        if type(layer).__module__.startswith(EAGER):
            raise BadWorkload(
                f"{what} is quantized already: {name or 'it'} is torch's quantized {type(layer).__name__}",
                where=where,
                fix=FLOAT_MODEL,
            )
        if isinstance(layer, torch.jit.ScriptModule):
            raise BadWorkload(
                f"{what} is TorchScript{f' at {name}' if name else ''}, which torch.export does not follow",
                where=where,
                fix="build it from its Python class, which takes the weights: load_state_dict(script.state_dict())",
            )
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        if fault := _fault(tensor, isinstance(tensor, nn.Parameter)):
            problem, fix = fault
            raise BadWorkload(f"{what} has {problem}, such as {name}", where=where, fix=fix)


def _fault(tensor: torch.Tensor, is_parameter: bool) -> tuple[str, str] | None:
    """Return what is wrong with a tensor of the model, and the way out."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if is_lazy(tensor):
        return "a parameter without a shape", "call the model once with a batch before it is returned"
    if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
        return f"a weight that is quantized or spread over machines already ({type(tensor).__name__})", FLOAT_MODEL
    if tensor.layout != torch.strided:
        return "a sparse tensor", "register it dense, .to_dense(), and use @ in place of torch.sparse.mm"
    if tensor.device.type != "cpu":
        fix = "load its weights" if tensor.is_meta else "return model.cpu()"
        return f"a tensor on the device {tensor.device}", fix
    if is_parameter and tensor.dtype in (torch.bfloat16, torch.float16):
        # Training loses small steps in 16 bits, and most of ONNX Runtime on a CPU lacks them.
        return (
            f"parameters in {kind}",
            "it is treated in float32: return model.float(), which keeps every number, and let forward cast to nothing "
            "shorter; quantize.half stores 16 bits at the end",
        )
    if tensor.dtype in (torch.complex128, torch.complex32):
        return f"a tensor in {kind}, which no bundle can hold", "make it complex64, .to(torch.complex64)"
    return None


def refuse_double(module: nn.Module, step: str) -> None:
    """Refuse to quantize a model in float64, which no quantizer takes.

    Raises:
        BadModel: more of its parameters are float64 than float32.
    """
    count = Counter[torch.dtype]()
    for parameter in module.parameters():
        count[parameter.dtype] += parameter.numel()
    if count[torch.float64] > count[torch.float32]:
        raise BadModel(
            f"has parameters in float64, and {step} takes float32",
            where=type(module).__name__,
            fix="return model.float(), and declare float64 inputs as float32",
        )


def separate(module: nn.Module) -> None:
    """Give every parameter and buffer memory of its own, in place; one tensor under several names stays one.

    A slice of a larger tensor, an expanded one, or one half of another cannot be saved whole, or not be written to.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # Kept alive, so that no new memory gets an old address.
    before = [tensor.untyped_storage() for tensor in tensors]
    whole: dict[int, Any] = {}
    made: dict[Any, torch.Tensor] = {}
    for tensor, storage in zip(tensors, before, strict=True):
        region = _region(tensor)
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        if plain and storage.nbytes() == tensor.nbytes and whole.setdefault(storage.data_ptr(), region) == region:
            continue
        if region not in made:
            made[region] = _plain(tensor).clone(memory_format=torch.contiguous_format)
        tensor.data = made[region]


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what `state_dict()` holds as a bundle stores it: each tensor once, under its first name."""
    kept: dict[Any, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            kept.setdefault(_region(tensor), (name, tensor))
    return {name: _plain(tensor).clone(memory_format=torch.contiguous_format) for name, tensor in kept.values()}


def load(module: nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
    """Give a module what `tensors` returned, in place; what else it keeps (`_extra_state`) it has from its own code.

    Raises:
        KeyError: a tensor of the module's is not stored.
        RuntimeError: one is too many, or has another shape.
    """
    first: dict[Any, str] = {}
    given: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        given[name] = stored[first.setdefault(_region(value), name)] if isinstance(value, torch.Tensor) else value
    if more := stored.keys() - given.keys():
        raise RuntimeError(f"the module has no {', '.join(sorted(more))}")
    module.load_state_dict(given)


def extras(module: nn.Module) -> dict[str, bytes]:
    """Return by name the bytes of what `state_dict()` holds beside tensors, for a comparison alone."""
    return {name: _bytes(value) for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)}


def fingerprint(module: nn.Module) -> str:
    """Return a digest of a module's parameters, buffers and extra state."""
    data = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            data.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            # Their bytes, since numpy has no bfloat16.
            data.update(_plain(value).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            data.update(name.encode() + _bytes(value))
    return data.hexdigest()


def _bytes(value: object) -> bytes:
    return repr(_told(value)).encode()


def _told(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return what tells a value from others: numbers and texts as they are, all else by its type and what it holds.

    `above` are the values that this one is in. Of what Python cannot take apart, such as a lock, the type is all.
    """
    if isinstance(value, PLAIN):
        return value
    kind = type(value).__qualname__
    if id(value) in above:
        return kind
    inner = partial(_told, above=(*above, id(value)))
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), _plain(value).flatten().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, inner(value.tolist())
    if isinstance(value, Mapping):
        return kind, sorted((repr(inner(key)), repr(inner(held))) for key, held in value.items())
    if isinstance(value, set | frozenset):
        return kind, sorted(repr(inner(held)) for held in value)
    if isinstance(value, list | tuple):
        return kind, [inner(held) for held in value]
    try:
        _, *parts = value.__reduce_ex__(2)
    except (TypeError, ValueError):
        return kind
    return kind, [inner(list(part) if isinstance(part, Iterator) else part) for part in parts]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without a history, its values in memory as they are read."""
    return tensor.detach().resolve_conj().resolve_neg()


def _region(tensor: torch.Tensor) -> Any:
    """Return by which memory a tensor is known: equal for two that are one."""
    where = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return (
        where,
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
