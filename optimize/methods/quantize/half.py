"""quantize.half: weights in 16 bits, and on a GPU the arithmetic too, where it is safe.

Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740): 16 bits hold a trained network but for values beyond
their range and for operators that add up many numbers. On a CPU ONNX Runtime computes in float32: there the weights are
stored in half the bytes and widened once, when the file is loaded.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph
from optimize.graph.retype import retype
from optimize.model.errors import BadRecipe, NoEffect
from optimize.predict import ranges
from optimize.source import sample
from optimize.step import options
from serve.config.target import TENSORRT, Target

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

LARGEST = 65504.0
"""The largest finite float16."""
MARGIN = 4.0
"""An activation that comes within this factor of `LARGEST` may pass it on other data."""
SUMS = ("Softmax", "LayerNormalization", "InstanceNormalization", "ReduceSum", "ReduceMean", "Pow", "Exp", "Loop", "If")
"""Operators that add many numbers up, or square them, and stay in float32 where the arithmetic is in 16 bits."""
RECURRENT = ("GRU", "RNN")
"""Operators that TensorRT's parser cannot put together in bfloat16, and whose compiler takes no Cast before them."""
SMALLEST_WEIGHT = 64
"""Numbers below which widening costs more bytes than it saves."""
BATCHES = 4


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Half:
    """Weights in 16 bits; with `compute`, the arithmetic too."""

    dtype: Literal["float16", "bfloat16"] = Field(default="float16", description="The 16-bit format.")
    compute: bool | None = Field(
        default=None,
        description="Compute in 16 bits as well, which needs calibration; by itself on a GPU only, for on a CPU ONNX "
        "Runtime widens at every operator.",
    )
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def needs(config: Half) -> tuple[str, ...]:
    """Return which data shows the values that 16 bits cannot hold."""
    return ("calibration",) if config.compute else ()


def suited(config: Half, target: Target) -> Half:
    """Return the config with `compute` said.

    Raises:
        BadRecipe: arithmetic in bfloat16 for another runtime than TensorRT, which lacks operators in it.
    """
    if config.compute is None:
        config = replace(config, compute=target.device == "cuda")
    if config.compute and config.dtype == "bfloat16" and target.runtime not in TENSORRT:
        raise BadRecipe(
            f"quantize.half: {target.runtime} has no operators that compute in bfloat16",
            fix='set dtype = "float16", or compute = false: weights alone may be bfloat16',
        )
    return config


def matches(subject: Path) -> list[str]:
    """List the nodes that have float weights."""
    return [str(node.name) for node in graph.load(subject).graph if _weights(node)]


def apply(config: Half, subject: Path, context: "Context") -> Path:
    """Convert the graph in place of its file; its inputs and outputs stay float32.

    Raises:
        NoEffect: no weight is left to convert.
    """
    import onnx_ir.passes.common

    model = graph.load(subject)
    kept = graph.excluded(model, config.exclude)
    if config.compute:
        wide = config.dtype == "bfloat16"
        kept += _before(model, RECURRENT) if wide else _beyond(subject, model, context)
        floats = dict(model.graph.initializers) if wide else None
        compute = functools.partial(_compute, kept=kept)
        return graph.rewrite(subject, compute, functools.partial(_mend, floats=floats))
    chosen = [node for node in model.graph if _weights(node) and node.name not in kept]
    if not chosen:
        raise NoEffect(
            "quantize.half: no weight is left to convert",
            fix=f"it could match: {', '.join(matches(subject)) or 'none'}",
        )
    for node in chosen:
        for index, value in _weights(node):
            node.replace_input_with(index, _stored(model, node, value, config.dtype))
    model.graph.sort()
    # Not `graph.clean`, which would do the widening here.
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    graph.save(model, subject)
    return subject


def _weights(node: "onnx_ir.Node") -> "list[tuple[int, onnx_ir.Value]]":
    """Return the float32 constants of a node that are worth converting, with their places among its inputs."""
    import onnx_ir

    return [
        (index, value)
        for index, value in enumerate(node.inputs)
        if value is not None
        and value.const_value is not None
        and value.const_value.dtype == onnx_ir.DataType.FLOAT
        and value.const_value.size >= SMALLEST_WEIGHT
    ]


def _stored(model: "onnx_ir.Model", node: "onnx_ir.Node", value: "onnx_ir.Value", dtype: str) -> "onnx_ir.Value":
    """Return the constant, stored in 16 bits and widened; finite numbers stay finite."""
    import ml_dtypes
    import numpy as np
    import onnx_ir

    name = f"{value.name}_{dtype}"
    for user in model.graph:
        if user.name == name:
            return user.outputs[0]
    array = graph.constant(value)
    narrow = (
        np.clip(array, -LARGEST, LARGEST).astype(np.float16) if dtype == "float16" else array.astype(ml_dtypes.bfloat16)
    )
    stored = onnx_ir.Value(name=f"{name}_stored", const_value=onnx_ir.tensor(narrow))
    model.graph.register_initializer(stored)
    widened = onnx_ir.node("Cast", [stored], attributes={"to": int(onnx_ir.DataType.FLOAT)}, name=name)
    widened.outputs[0].name = name
    model.graph.insert_before(node, widened)
    return widened.outputs[0]


def _beyond(path: Path, model: "onnx_ir.Model", context: "Context") -> list[str]:
    """Return the nodes that meet values near the end of float16's range on calibration data."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    floats = {value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == 1}
    names = [str(output.name) for node in model.graph for output in node.outputs if output.name in floats]
    # Padding stays: where it overflows, the answer is NaN too.
    drawn = sample.batches(context.workload, "calibration", BATCHES, context.seed)
    batches = (batch.inputs for batch in drawn)
    reached = ranges.largest(path, names, batches)
    return [
        str(node.name)
        for node in model.graph
        if any(reached.get(str(value.name), 0.0) > LARGEST / MARGIN for value in (*node.inputs, *node.outputs) if value)
    ]


def _before(model: "onnx_ir.Model", kinds: Sequence[str]) -> list[str]:
    """Return the names of the nodes of these types, and of all that they depend on."""
    found, waiting = set["onnx_ir.Node"](), [node for node in model.graph if node.op_type in kinds]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.predecessors()
    return [str(node.name) for node in found]


def _compute(source: str, destination: str, kept: list[str]) -> None:
    """Write the graph with its arithmetic in float16 but for sums and the nodes `kept`."""
    import onnx_ir
    from onnxruntime.transformers import float16

    # By its path: a graph past 2 GB is in no message whose shapes could be inferred.
    converted = float16.convert_float_to_float16(
        source,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *SUMS],
        node_block_list=kept,
    )
    # It writes a Cast for every float32 operator that reads a value, all of them under one name.
    single = list({tuple(node.output): node for node in converted.graph.node}.values())
    del converted.graph.node[:]
    converted.graph.node.extend(single)
    graph.save(onnx_ir.serde.deserialize_model(converted), Path(destination))


def _mend(model: "onnx_ir.Model", floats: "Mapping[str, onnx_ir.Value] | None") -> None:
    """Mend what the converter wrote; with the `floats` that its weights were, make bfloat16 of its float16."""
    import onnx_ir

    # It puts its own nodes last.
    model.graph.sort()
    _join(model)
    if floats is not None:
        # Float16 has cut off what is beyond its range.
        retype(model, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, floats)


def _join(model: "onnx_ir.Model") -> None:
    """Connect float32 operators directly: the converter narrows between any two, and a large value overflows there."""
    import onnx_ir

    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if before is None or before.op_type != "Cast" or node.outputs[0].is_graph_output():
            continue
        kinds = [cast.attributes.get_int("to", 0) for cast in (before, node)]
        source = before.inputs[0]
        if source is not None and kinds == [onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT]:
            # What is no float32, a mask say, is cast to it at once.
            node.replace_input_with(0, source)
            if source.dtype == onnx_ir.DataType.FLOAT:
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], source)
