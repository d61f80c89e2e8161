"""Short: a workload from a module and its data loaders; what is not said is read from the first batches.

What was read so is told: it stands in the workload's `inferred`, which a run prints once and its lineage keeps.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from modelathe.tensors import BATCH, Array, Arrays, Dim, TensorSpec
from optimize.model.errors import BadWorkload
from optimize.source import loaders, losses, metrics, torchmetric
from optimize.source.batch import DATA, Batch, Batches, guarded

LOOKED_AT = 64
"""Batches of a set other than the evaluation's that are looked at for sizes: a set may be endless."""


@dataclass
class Seen:
    """What the batches showed of one input: type, sizes by axis in their order, and the range of its whole numbers."""

    dtype: str
    sizes: list[tuple[int, ...]]
    low: float = np.inf
    high: float = -np.inf


def read(model: Any, evaluation: Any, metric: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a workload but its model; arguments and errors as for `Workload.of`, `said` its `fields`."""
    module = model if isinstance(model, nn.Module) else guarded(model, "model()", "")
    if not isinstance(module, nn.Module):
        raise BadWorkload(f"model is {type(module).__name__}", fix="give a torch module, or a function that returns it")
    taken, told, rest = loaders.arguments(module), list[str](), dict(said)
    name = rest.pop("name", "") or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(module).__name__).lower()
    given = {"evaluation": evaluation, **{kind: rest.pop(kind) for kind in DATA if rest.get(kind) is not None}}
    floats = _float_of(module)
    sets = {kind: _cast(loaders.batches(loader, kind, taken, ""), floats) for kind, loader in given.items()}
    inputs = tuple(rest.pop("inputs", None) or _specs(sets, told))
    first = next(iter(sets["evaluation"]()))
    outputs, sample = _outputs(module, first, rest.pop("outputs", None), told)
    stated = _metric(metric, sample, first, rest, told)
    if isinstance(rest.get("loss"), str):
        rest["loss"] = losses.named(rest["loss"])
    found = {"name": name, "inputs": inputs, "outputs": outputs, "inferred": tuple(told)}
    return {**found, **sets, **stated, **rest}


def _float_of(module: nn.Module) -> str:
    """Return the type of the module's own numbers."""
    kinds = [parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()]
    return str(kinds[0]).removeprefix("torch.") if kinds else "float32"


def _cast(read: Batches, floats: str) -> Batches:
    """Return the batches with the inputs' numbers in the type of the module's."""

    def cast() -> Any:
        for batch in read():
            inputs = {
                name: array.astype(floats) if array.dtype.kind == "f" and str(array.dtype) != floats else array
                for name, array in batch.inputs.items()
            }
            yield Batch(inputs, batch.targets)

    return cast


def _specs(sets: Mapping[str, Batches], told: list[str]) -> tuple[TensorSpec, ...]:
    """Return the inputs' specs: the batch is free, and so are dims that were seen to differ."""
    seen: dict[str, Seen] = {}
    for kind, batches in sets.items():
        for batch in batches() if kind == "evaluation" else islice(batches(), LOOKED_AT):
            for name, array in batch.inputs.items():
                _look(seen, name, array)
    names: dict[tuple[int, ...], str] = {}
    return tuple(_spec(name, found, names, told) for name, found in seen.items())


def _look(seen: dict[str, Seen], name: str, array: Array) -> None:
    found = seen.setdefault(name, Seen(str(array.dtype), []))
    if found.sizes and len(found.sizes[0]) != array.ndim - 1:
        raise BadWorkload(
            f"input {name!r} has {array.ndim} axes in one batch and {len(found.sizes[0]) + 1} in another",
            fix="give every batch the same axes",
        )
    found.sizes.append(array.shape[1:])
    if array.dtype.kind in "iu" and array.size:
        found.low, found.high = min(found.low, array.min()), max(found.high, array.max())


def _spec(name: str, found: Seen, names: dict[tuple[int, ...], str], told: list[str]) -> TensorSpec:
    dims: list[int | Dim] = [BATCH]
    for axis, sizes in enumerate(zip(*found.sizes, strict=True), 1):
        if len(set(sizes)) == 1:
            dims.append(sizes[0])
            continue
        # Axes that always had the same sizes are one dim, as tokens and their mask have.
        dim = Dim(names.setdefault(sizes, f"{name}_{axis}"), min(sizes), int(np.median(sizes)), max(sizes))
        dims.append(dim)
        if not dim.name.startswith(f"{name}_{axis}"):
            told.append(f"axis {axis} of {name} always has the size of {dim.name}: they are one")
        told.append(
            f"axis {axis} of {name} is free, {dim.minimum} to {dim.maximum}; give inputs=(TensorSpec(…),) for more"
        )
    values = (int(found.low), int(found.high)) if found.low <= found.high else None
    shape = ", ".join(dim.name if isinstance(dim, Dim) else str(dim) for dim in dims)
    told.append(f"input {name}: {found.dtype} [{shape}]" + (f", {values[0]} to {values[1]}" if values else ""))
    return TensorSpec(name, found.dtype, tuple(dims), values)


def _outputs(
    module: nn.Module, first: Batch, named: tuple[str, ...] | None, told: list[str]
) -> tuple[tuple[str, ...], Array]:
    """Return the outputs' names, and what the first one says of the first batch."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in first.inputs.items()}
    training = module.training
    with torch.no_grad():
        answer = guarded(lambda: module.eval()(**tensors), f"{type(module).__name__}.forward", "")
    module.train(training)
    if isinstance(answer, torch.Tensor):
        found = {"output": answer}
    elif isinstance(answer, Mapping):
        found = {str(name): value for name, value in answer.items() if isinstance(value, torch.Tensor)}
    elif isinstance(answer, tuple | list) and all(isinstance(value, torch.Tensor) for value in answer):
        found = {f"output{number}": value for number, value in enumerate(answer)}
    else:
        raise BadWorkload(
            f"{type(module).__name__}.forward returns {type(answer).__name__}, not tensors",
            fix="wrap it in a module whose forward returns a tensor, a tuple or a mapping of tensors",
        )
    names = tuple(named or found)
    if not named:
        told.append(f"outputs: {', '.join(names)}")
    return names, loaders.array(next(iter(found.values())))


def _metric(metric: Any, sample: Array, first: Batch, said: dict[str, Any], told: list[str]) -> dict[str, Any]:
    """Return the workload's fields that say how it is judged."""
    better = said.pop("higher_is_better", None)
    if isinstance(metric, str) or torchmetric.is_one(metric):
        name, chosen = _known(metric, sample, first.targets)
        judge, stated = chosen.judge, {"bounded": chosen.bounded, "aggregate": chosen.aggregate}
        better = chosen.higher_is_better if better is None else better
        told.append(f"metric {name}" + ("" if better is None else f": {'more' if better else 'less'} is better"))
        if name in ("accuracy", "f1", "iou") and sample.size == np.asarray(first.targets).size:
            told.append(f"a label is said to be there above {metrics.threshold(sample):g}")
    else:
        name, judge = getattr(metric, "__name__", "score"), metric
        stated = {key: said.pop(key) for key in ("bounded", "aggregate") if key in said}
    stated["higher_is_better"] = {name: better} if isinstance(better, bool) else better or {}
    return {**stated, "scores": _scores(name, judge)}


def _known(metric: "str | torchmetric.TorchMetric", sample: Array, targets: Any) -> tuple[str, metrics.Metric]:
    if targets is None or isinstance(targets, Mapping):
        several = "one array of targets, not several by name" if targets else "targets"
        name = metric if isinstance(metric, str) else type(metric).__name__
        raise BadWorkload(f"{name} needs {several}", fix="let the evaluation's batches be (inputs, targets)")
    if isinstance(metric, str):
        return metric, metrics.named(metric, sample, np.asarray(targets))
    return torchmetric.read(metric)


def _scores(name: str, judge: Callable[[Array, Any], Array]) -> Callable[[Arrays, Any, Arrays], dict[str, Array]]:
    def scores(outputs: Arrays, targets: Any, _reference: Arrays) -> dict[str, Array]:
        return {name: judge(next(iter(outputs.values())), targets)}

    return scores
