"""Units: the parts of a transformer that can be removed one by one, attention heads and feed-forward neurons.

What belongs to a unit is guessed from the modules (which linear layers, in which order of the rows) and then proved by
running the model: without a unit, it must compute what it computes with the unit's output weights at zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from optimize.methods.prune import observe
from optimize.model.copies import copied
from optimize.model.errors import BadModel

TOLERANCE = 1e-4
"""Of the largest value: what another order of summation may change in float32."""


@dataclass(frozen=True)
class Slice:
    """Where the units lie in one tensor: `rows[unit]` are their indices along `axis`.

    Args:
        layer: name of the submodule.
        tensor: name of its parameter or buffer.
        axis: 0 for output rows, 1 for input columns.
        rows: int64 [units, indices of each unit].
    """

    layer: str
    tensor: str
    axis: int
    rows: Tensor


@dataclass(frozen=True)
class Units:
    """All heads of one attention, or all neurons of one feed-forward block.

    Args:
        name: the attention, or the first linear layer of the block.
        count: how many there are.
        slices: every tensor that loses something with a unit.
        sizes: module, attribute and what the attribute loses with each unit.
        reader: the linear layer whose input columns are the units' outputs; its weight is the last of `slices`.
    """

    name: str
    count: int
    slices: tuple[Slice, ...]
    sizes: tuple[tuple[str, str, int], ...]
    reader: str


def attentions(module: nn.Module) -> dict[str, list[Units]]:
    """Return, for each module that looks like an attention, the readings of its layers that are worth a trial."""
    linears = _linears(module)
    found: dict[str, list[Units]] = {}
    for name, owner in module.named_modules():
        direct = [linear for linear in linears if linear.rpartition(".")[0] == name]
        if not direct or not _head_counts(owner):
            continue
        after = linears[linears.index(direct[-1]) + 1 :][:1]
        readings = [
            units
            for reader in [*reversed([*direct, *after])]
            for projections, inner in _projections(module, [x for x in direct if x != reader], reader)
            for count in sorted(set(_head_counts(owner).values()))
            if inner % count == 0
            for units in _readings(module, name, projections, reader, count)
        ]
        if readings:
            found[readings[0].name] = readings
    return found


def feed_forwards(module: nn.Module) -> dict[str, list[Units]]:
    """Return pairs of neighbouring linear layers that widen and narrow again, by the name of the first."""
    found: dict[str, list[Units]] = {}
    for wide, reader in pairwise(_linears(module)):
        first, second = _linear(module, wide), _linear(module, reader)
        if first.out_features == second.in_features > max(first.in_features, second.out_features):
            count = first.out_features
            rows = torch.arange(count)[:, None]
            sizes = ((wide, "out_features", 1), (reader, "in_features", 1))
            slices = (*_rows_of(module, wide, rows), Slice(reader, "weight", 1, rows))
            found[wide] = [Units(wide, count, slices, sizes, reader)]
    return found


def proven(
    module: nn.Module, readings: Sequence[Units], inputs: Mapping[str, Tensor], names: Sequence[str]
) -> Units | None:
    """Return the first reading under which removing a unit changes nothing but that unit's part, or None.

    Raises:
        BadModel: the model does not run as it is.
    """
    for units in readings:
        if units.count < 2 or _shared(module, units):
            continue
        silent, without = copied(module), copied(module)
        with torch.no_grad():
            _linear(silent, units.reader).weight[:, units.slices[-1].rows[0]] = 0
        wanted = _output_of(silent, units.reader, inputs, names)
        try:
            remove(without, units, range(1, units.count))
            if _agree(wanted, _output_of(without, units.reader, inputs, names)):
                return units
        except (BadModel, RuntimeError, IndexError):
            # The model's code does not follow the smaller size under this reading.
            continue
    return None


def remove(module: nn.Module, units: Units, kept: Sequence[int]) -> None:
    """Keep only the units of these indices, in place, in every tensor and every size attribute."""
    for part in units.slices:
        layer = module.get_submodule(part.layer)
        old: Tensor = getattr(layer, part.tensor)
        # In the order of the tensor: the rows of one unit need not lie together.
        index = part.rows[list(kept)].flatten().sort().values
        new = old.detach().index_select(part.axis, index).clone()
        setattr(layer, part.tensor, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
    for name, attribute, each in units.sizes:
        owner = module.get_submodule(name)
        setattr(owner, attribute, getattr(owner, attribute) - each * (units.count - len(kept)))


def _linears(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and _is_plain(name, module)]


def _is_plain(name: str, module: nn.Module) -> bool:
    """Not the output layer inside torch's own attention, which is never called."""
    return not isinstance(module.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _head_counts(owner: nn.Module) -> dict[str, int]:
    """Return the attributes that say how many heads there are."""
    return {
        key: value
        for key, value in vars(owner).items()
        if isinstance(value, int)
        and not isinstance(value, bool)
        and value > 0
        and (("head" in key.lower() and "dim" not in key and "size" not in key) or key == "h")
    }


def _projections(module: nn.Module, direct: Sequence[str], reader: str) -> Iterator[tuple[list[tuple[str, int]], int]]:
    """Yield runs of layers that together are query, key and value, each with its share of these three."""
    inner = _linear(module, reader).in_features
    for start in range(len(direct)):
        run: list[tuple[str, int]] = []
        for name in direct[start:]:
            share, rest = divmod(_linear(module, name).out_features, inner)
            run.append((name, share))
            total = sum(part for _, part in run)
            if rest or share == 0 or total >= 3:
                break
        if not rest and all(part for _, part in run) and total == 3:
            yield run, inner


def _readings(
    module: nn.Module, name: str, projections: list[tuple[str, int]], reader: str, count: int
) -> Iterator[Units]:
    inner = _linear(module, reader).in_features
    owner = module.get_submodule(name)
    heads = tuple((name, key, 1) for key, value in _head_counts(owner).items() if value == count)
    width = inner // count
    named = [key for key, value in vars(owner).items() if type(value) is int and value == inner and value != count]
    # An attribute as large as all heads together may also be the width of the model.
    choices = [[key for key in named if "head" in key or "inner" in key], named, []]
    widths = [tuple((name, key, width) for key in keys) for keys in choices]
    features = (
        *((linear, "out_features", share * width) for linear, share in projections),
        (reader, "in_features", width),
    )
    last = Slice(reader, "weight", 1, torch.arange(inner).reshape(count, -1))
    own = tuple(
        Slice(name, key, axis, torch.arange(count)[:, None])
        for key, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
        for axis in [axis for axis, size in enumerate(tensor.shape) if size == count][:1]
    )
    for by_head in (False, True) if any(share > 1 for _, share in projections) else (False,):
        rows = [
            part
            for linear, share in projections
            for part in _rows_of(module, linear, _rows(inner, count, share, by_head))
        ]
        for sizes in dict.fromkeys(widths):
            yield Units(name or type(owner).__name__, count, (*rows, *own, last), (*heads, *sizes, *features), reader)


def _rows(inner: int, count: int, share: int, by_head: bool) -> Tensor:
    """Return the rows of each head in a layer that holds `share` of query, key and value.

    They lie one after the other, or all that belongs to one head lies together (`by_head`).
    """
    every = torch.arange(share * inner)
    if by_head:
        return every.reshape(count, -1)
    return every.reshape(share, count, -1).transpose(0, 1).reshape(count, -1)


def _rows_of(module: nn.Module, name: str, rows: Tensor) -> Iterator[Slice]:
    yield Slice(name, "weight", 0, rows)
    if _linear(module, name).bias is not None:
        yield Slice(name, "bias", 0, rows)


def _shared(module: nn.Module, units: Units) -> bool:
    """Whether a tensor of theirs is used under another name too, which would have to lose the same."""
    uses: dict[int, int] = {}
    for _, layer in module.named_modules():
        for tensor in layer._parameters.values():
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    return any(uses.get(id(getattr(module.get_submodule(part.layer), part.tensor)), 0) > 1 for part in units.slices)


def _output_of(module: nn.Module, name: str, inputs: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    outputs: list[Tensor] = []
    (returned,) = observe.run(module, [inputs], names, {name: lambda _layer, _args, _named, out: outputs.append(out)})
    return [*outputs, *returned.values()]


def _agree(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
        for a, b in zip(first, second, strict=True)
        if a.is_floating_point()
    )
