"""quantize.fp8: 8-bit floating point weights and activations as Q/DQ, for GPUs that multiply in it.

E4M3 as in Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433): one scale for each output channel of
a weight and one for each activation, the largest magnitude over 448. TensorRT and ONNX Runtime on a recent NVIDIA GPU
multiply in FP8; a CPU converts to float32 and back at every layer, which checks the structure and is slower.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from modelathe.tensors import Array
from optimize.graph import graph
from optimize.methods.quantize import calibrate
from optimize.predict import ranges
from optimize.source import padding
from optimize.step import options

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

WEIGHTED = ("Conv", "Gemm", "MatMul")
LARGEST = 448.0
"""The largest finite E4M3 number."""
OPSET = 21
"""The first opset in which Q/DQ may say their type without a zero point."""
SMALLEST = 1e-8
"""Stands for the magnitude of what is always zero."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fp8:
    """FP8 (E4M3) weights and activations, Q/DQ; for a GPU, slower on a CPU."""

    samples: int = calibrate.SAMPLES
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def needs(config: Fp8) -> tuple[str, ...]:
    """Return which data of the workload the ranges are taken from."""
    return ("calibration",)


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    return graph.names_of(graph.quantizable(subject), WEIGHTED)


def apply(config: Fp8, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file."""
    model = graph.quantizable(subject)
    graph.refuse_quantized(model, subject)
    names = graph.excluded(model, config.exclude)
    graph.refuse_idle(model, WEIGHTED, names)
    chosen = set(graph.names_of(model, WEIGHTED)) - set(names)
    nodes = [node for node in model.graph if node.name in chosen]
    activations = list(dict.fromkeys(str(node.inputs[0].name) for node in nodes if node.inputs[0] is not None))
    batches = calibrate.samples(context.workload, config.samples)
    reached = ranges.largest(subject, activations, batches, partial(padding.mask, context.workload))
    rounded: dict[str, onnx_ir.Value] = {}
    for node in nodes:
        name = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        if name not in rounded:
            rounded[name] = _round_activation(model, node, reached[name])
        node.replace_input_with(0, rounded[name])
        node.replace_input_with(1, _round_weight(model, node))
    model.graph.sort()
    graph.clean(model)
    model.opset_imports[""] = OPSET
    graph.save(model, subject)
    return subject


def _round_activation(model: "onnx_ir.Model", node: "onnx_ir.Node", reached: float) -> "onnx_ir.Value":
    """Insert Q and DQ behind the first input of `node` and return what comes out."""
    import numpy as np
    import onnx_ir

    value = node.inputs[0]
    assert value is not None
    scale = _constant(model, f"{value.name}_scale", np.float32(max(reached, SMALLEST) / LARGEST))
    # Without a zero point, which is 0: where there is one, ONNX Runtime 1.31 takes it for that of an unsigned integer,
    # and drops a Relu before it without a word.
    kind = {"output_dtype": int(onnx_ir.DataType.FLOAT8E4M3FN)}
    quantized = onnx_ir.node("QuantizeLinear", [value, scale], attributes=kind)
    restored = onnx_ir.node("DequantizeLinear", [quantized.outputs[0], scale])
    quantized.outputs[0].name, restored.outputs[0].name = f"{value.name}_q", f"{value.name}_dq"
    model.graph.insert_before(node, [quantized, restored])
    return restored.outputs[0]


def _round_weight(model: "onnx_ir.Model", node: "onnx_ir.Node") -> "onnx_ir.Value":
    """Insert DQ behind an FP8 copy of the weight, one scale for each output channel, and return what comes out."""
    import numpy as np
    import onnx_ir

    weight = graph.constant(node.inputs[1])
    outputs_first = node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
    axis = 0 if outputs_first else weight.ndim - 1
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = (np.maximum(np.abs(weight).max(axis=others), SMALLEST) / LARGEST).astype(np.float32)
    spread = scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
    name = f"{node.name}_weight"
    values = [
        _constant(model, name, _float8(weight / spread)),
        _constant(model, f"{name}_scale", scale),
    ]
    restored = onnx_ir.node("DequantizeLinear", values, attributes={"axis": axis})
    restored.outputs[0].name = f"{name}_dq"
    model.graph.insert_before(node, restored)
    return restored.outputs[0]


def _float8(array: Array) -> Any:
    import ml_dtypes

    return array.astype(ml_dtypes.float8_e4m3fn)


def _constant(model: "onnx_ir.Model", name: str, array: Any) -> "onnx_ir.Value":
    import onnx_ir

    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array))
    model.graph.register_initializer(value)
    return value
