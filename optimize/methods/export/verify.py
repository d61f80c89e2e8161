"""Verify: does an exported graph answer as its module does, at every size that the workload declares?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelathe.tensors import Array, Arrays, Dim, TensorSpec, generated
from optimize.model.errors import BadGraph, BadModel, BadWorkload, first_line

if TYPE_CHECKING:
    from torch import nn

    from optimize.predict.module import TorchPredictor


TOLERANCE = 1e-3
"""Largest difference between graph and module, as a share of the output's largest value (at least 1)."""

LARGEST_BATCH, MOST_VALUES = 64, 2**22
"""The largest batch, and the most values of one input, that are tried."""

NO_NAN = (
    "declare the range of values that the inputs really have; where a row may be masked whole, leave one place of it "
    "unmasked, or a softmax sees nothing but -inf"
)
FREE = "take sizes from the inputs (x.shape[0], or -1 in reshape), as tensors and not through int()"
UNROLLED = (
    "; a loop in Python over one is written down for the example: call the layer once for the whole sequence "
    "(nn.LSTM, not nn.LSTMCell step by step), or declare one size"
)
Fault = Callable[[Mapping[str, int]], str]


def dims_of(inputs: Sequence[TensorSpec]) -> dict[str, Dim]:
    """Return the dims that may change size, by name.

    Raises:
        BadWorkload: one name stands for two ranges.
    """
    dims: dict[str, Dim] = {}
    for dim in (dim for spec in inputs for dim in spec.dims if isinstance(dim, Dim)):
        if dims.setdefault(dim.name, dim) != dim:
            raise BadWorkload(
                f"the dim {dim.name!r} has two different ranges", fix="give equal dims one range, others another name"
            )
    return {name: dim for name, dim in dims.items() if dim.minimum < dim.maximum}


def sizes_to_try(inputs: Sequence[TensorSpec]) -> list[dict[str, int]]:
    """Return three sets of sizes: the smallest, an odd and typical one, and a larger one; in each all dims differ."""
    dims = dims_of(inputs)
    smallest = {name: dim.minimum for name, dim in dims.items()}
    middle = {name: 3 if name == "batch" else dim.typical for name, dim in dims.items()}
    larger = {name: 2 * dim.typical + 1 for name, dim in dims.items()}
    return [smallest, _apart(middle, dims), _apart(larger, dims)]


def largest_sizes(inputs: Sequence[TensorSpec]) -> list[dict[str, int]]:
    """Return the largest batch that a server is likely to form, and all other dims at their maximum, if they have any.

    What would take more than `MOST_VALUES` values is left out.
    """
    dims = dims_of(inputs)
    batch = {name: min(dim.maximum, LARGEST_BATCH) if name == "batch" else dim.typical for name, dim in dims.items()}
    others = {name: dim.minimum if name == "batch" else dim.maximum for name, dim in dims.items()}

    def fits(sizes: Mapping[str, int]) -> bool:
        return max(math.prod(_shape(spec, sizes)) for spec in inputs) <= MOST_VALUES

    return [sizes for sizes in (batch, others) if fits(sizes)]


def _apart(wanted: Mapping[str, int], dims: Mapping[str, Dim]) -> dict[str, int]:
    """Bring the sizes into range, where possible without two that are equal."""
    sizes: dict[str, int] = {}
    for name, dim in dims.items():
        size = min(max(wanted[name], dim.minimum), dim.maximum)
        free = (other for other in range(size, dim.minimum - 1, -1) if other not in sizes.values())
        sizes[name] = next(free, size)
    return sizes


def extremes(inputs: Sequence[TensorSpec]) -> Iterator[tuple[str, dict[str, Array]]]:
    """Yield inputs at the ends of their declared ranges: all at the lowest value, all at the highest."""
    sizes = sizes_to_try(inputs)[1]
    for what, end in (("lowest", 0), ("highest", 1)):
        arrays = generate(inputs, sizes)
        for spec in inputs:
            if spec.dtype != "object":
                arrays[spec.name] = np.full_like(arrays[spec.name], (spec.values or (0, 1))[end])
        values = ", ".join(f"{spec.name} {(spec.values or (0, 1))[end]:g}" for spec in inputs if spec.dtype != "object")
        yield f"the {what} values{f' ({values})' if values else ''}", arrays


def generate(inputs: Sequence[TensorSpec], sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Return in-range random inputs by name, the dims named in `sizes` at those sizes, others at their minimum."""
    return generated([replace(spec, dims=_shape(spec, sizes)) for spec in inputs], seed=seed)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(dim.name, dim.minimum) if isinstance(dim, Dim) else dim for dim in spec.dims)


def output_dims(
    module: "nn.Module", inputs: Sequence[TensorSpec], outputs: Sequence[str]
) -> dict[str, tuple[int | str, ...]]:
    """Return the dims of every output: an int where it is fixed, the name of the dim that it follows where not.

    Raises:
        BadModel: the module does not run at a declared size, answers the same inputs otherwise at a second call, or an
            output's first axis does not follow the batch.
    """
    from optimize.predict.module import TorchPredictor

    predictor = TorchPredictor(module, outputs)
    tried = sizes_to_try(inputs)
    answers = [_asked_twice(predictor, generate(inputs, sizes), type(module).__name__) for sizes in tried]
    dims: dict[str, tuple[int | str, ...]] = {}
    for name in outputs:
        shapes = [answer[name].shape for answer in answers]
        for shape, sizes in zip(shapes, tried, strict=True):
            if not shape or shape[0] != sizes.get("batch", shape[0]):
                raise BadModel(
                    f"output {name!r} has the shape {shape} for a batch of {sizes['batch']}: its batch axis is frozen",
                    where=type(module).__name__,
                    fix="take the batch size from the input (x.shape[0]) and keep it as the first axis of every output",
                )
        if len({len(shape) for shape in shapes}) > 1:
            raise BadModel(
                f"output {name!r} changes its number of axes with the sizes of the inputs",
                where=type(module).__name__,
                fix="keep every axis (squeeze none that may be 1)",
            )
        dims[name] = tuple(
            _dim(axis_sizes, tried, f"{name}_{axis}") for axis, axis_sizes in enumerate(zip(*shapes, strict=True))
        )
    return dims


def _asked_twice(predictor: "TorchPredictor", arrays: Arrays, where: str) -> Arrays:
    """Return the answer to these inputs, if it is the same at a second call."""
    import torch

    answer = predictor.predict(arrays)
    found = _difference(predictor.predict(arrays), answer, values=True)
    if not found:
        return answer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = predictor.predict(arrays)
        torch.manual_seed(0)
        second = predictor.predict(arrays)
    if not _difference(second, first, values=True):
        raise BadModel(
            f"answers by chance: asked twice, {found}",
            where=where,
            fix="draw no random numbers in evaluation: functional.dropout(x, p, self.training), the mean, not a sample",
        )
    raise BadModel(
        f"changes its answers from call to call: asked twice, {found}",
        where=where,
        fix="let forward answer from its inputs alone: make what it keeps of the calls before an input and an output",
    )


def _dim(sizes: tuple[int, ...], tried: Sequence[Mapping[str, int]], otherwise: str) -> int | str:
    if len(set(sizes)) == 1:
        return sizes[0]
    return next((name for name in tried[0] if tuple(some[name] for some in tried) == sizes), otherwise)


def check(
    path: Path,
    module: "nn.Module",
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    *,
    values: bool = True,
    real: Arrays | None = None,
) -> None:
    """Check the file against the module: valid ONNX, the same names, equal answers.

    Tried are random values at `sizes_to_try` and `largest_sizes`, the ends of the declared ranges, and real data.

    Args:
        path: the ONNX file.
        module: what it was exported from.
        inputs: as the workload declares them.
        outputs: the names that the workload declares.
        values: without it, answers are equal that have the same dtypes and shapes.
        real: a batch of the user's own inputs by name.

    Raises:
        BadGraph: naming the axis that the export has frozen, or the output that differs and on which inputs.
    """
    import onnx

    from optimize.predict.module import TorchPredictor
    from optimize.predict.onnxruntime import OnnxPredictor

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise BadGraph(
            f"the exported graph is not valid: {first_line(error) or type(error).__name__}",
            where=type(module).__name__,
            fix="ask for another opset, or write what the message names in other operators",
        ) from error
    torch_side = TorchPredictor(module, outputs)
    with OnnxPredictor(path) as onnx_side:
        names = [value.name for value in onnx_side.session.get_outputs()]
        if names != list(outputs):
            raise BadGraph(
                f"the exported graph returns {names}, the workload declares {list(outputs)}",
                where=type(module).__name__,
                fix="return each output once, as a tensor of its own",
            )

        def differs(arrays: Arrays) -> str:
            try:
                return _difference(onnx_side.predict(arrays), torch_side.predict(arrays), values)
            except BadGraph as error:
                return error.what

        def fault(sizes: Mapping[str, int]) -> str:
            return differs(generate(inputs, sizes, seed=1))

        for sizes in (*sizes_to_try(inputs), *largest_sizes(inputs)):
            if found := fault(sizes):
                what, fix = _diagnosis(found, sizes, inputs, fault)
                raise BadGraph(what, where=type(module).__name__, fix=fix)
        for what, arrays in (*extremes(inputs), *([("the workload's own data", real)] if real else [])):
            if found := differs(arrays):
                raise BadGraph(
                    f"the exported graph differs from the module on {what}: {found}",
                    where=type(module).__name__,
                    fix=NO_NAN
                    if "NaN" in found
                    else "keep branches on values out of forward (torch.where instead of if)",
                )


def warm(module: "nn.Module", inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
    """Run the module at its largest sizes, so that a table which it keeps and lets grow has its whole size.

    Raises:
        BadModel: it does not run at them.
    """
    from optimize.predict.module import TorchPredictor

    for sizes in largest_sizes(inputs):
        TorchPredictor(module, outputs).predict(generate(inputs, sizes))


def _diagnosis(found: str, sizes: Mapping[str, int], inputs: Sequence[TensorSpec], fault: Fault) -> tuple[str, str]:
    """Return what is wrong and the way out: an axis that is frozen, if only changing one dim brings the fault about."""
    tried = sizes_to_try(inputs)
    # Where a NaN comes and goes, that is by the values and not by the sizes.
    for name in () if "NaN" in found else dims_of(inputs):
        variants = [{**sizes, name: other[name]} for other in tried]
        faults = [bool(fault(variant)) for variant in variants]
        if any(faults) and not all(faults):
            good = variants[faults.index(False)][name]
            axes = ", ".join(
                f"{spec.name!r} (axis {axis})"
                for spec in inputs
                for axis, dim in enumerate(spec.dims)
                if isinstance(dim, Dim) and dim.name == name
            )
            return (
                f"the export has frozen the dim {name!r} of {axes}: it works at {good}, not at {sizes[name]}: {found}",
                FREE if name == "batch" else f"{FREE}{UNROLLED}",
            )
    at = ", ".join(f"{name} {size}" for name, size in sizes.items())
    fix = NO_NAN if "NaN" in found else "ask for another opset, or write what that output comes from in other operators"
    return f"the exported graph differs from the module at {at}: {found}", fix


def _difference(got: Arrays, wanted: Arrays, values: bool) -> str:
    """Return what differs between two answers beyond rounding; empty when nothing does."""
    for name, right in wanted.items():
        left = got[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"output {name!r} is {left.dtype} {left.shape}, the module returns {right.dtype} {right.shape}"
        if not values:
            continue
        if right.dtype.kind != "f":
            if not np.array_equal(left, right):
                return f"output {name!r} differs in {int((left != right).sum())} of {right.size} values"
            continue
        apart = ~(np.isfinite(left) & np.isfinite(right))
        if not np.array_equal(left[apart], right[apart], equal_nan=True):
            which = "the module's is not" if (apart & np.isfinite(right)).any() else "the module's is something else"
            return f"output {name!r} is NaN or infinite where {which}"
        largest = float(np.abs(left[~apart] - right[~apart]).max(initial=0.0))
        scale = max(1.0, float(np.abs(right[~apart]).max(initial=0.0)))
        if not largest <= TOLERANCE * scale:
            return f"output {name!r} differs by {largest:.2g}"
    return ""
