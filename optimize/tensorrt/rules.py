"""What TensorRT's ONNX parser takes of a quantized graph, checked without TensorRT.

The rules are those of the parser, and of NVIDIA's "Working with Quantized Types" and "ONNX Opset Guide" for TensorRT
10 and 11. That every other operator is known to TensorRT is not checked; the build says so where one is not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modelathe.tensors import Array
from optimize.graph import graph
from optimize.model.errors import BadGraph

if TYPE_CHECKING:
    import onnx_ir

OPSETS = (9, 25)
"""The parser of TensorRT 11 takes these; that of 10.0 ends at 20."""
INTEGER = (
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "QLinearMatMul",
    "QLinearConv",
)
"""Operators of integer arithmetic that the parser does not know: it makes its own of Q/DQ pairs."""
WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
CARRIERS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
"""Operators that may lie between a quantized value and where it is used."""
OPERATORS = "operators"
"""The rule about operators that TensorRT lacks, which ONNX Runtime can compute beside it."""
SYMMETRIC = 'quantize the float export with quantize.static and activations = "int8"'


@dataclass(frozen=True)
class Finding:
    """Where a graph breaks a rule.

    Args:
        level: `error` where the engine will not build or would answer wrongly, `warning` where it will be slower.
        rule: its short name.
        node: the node, input or output that breaks it.
        what: what is wrong.
        fix: what to do.
    """

    level: Literal["error", "warning"]
    rule: str
    node: str
    what: str
    fix: str


def check(path: Path) -> list[Finding]:
    """Return where the graph in `path` breaks a rule, in the order of the rules.

    Raises:
        BadGraph: it is not an ONNX file.
    """
    model = graph.load(path)
    rules: tuple[Callable[[onnx_ir.Model], Iterator[Finding]], ...] = (
        _opset,
        _types,
        _operators,
        _zero_points,
        _scales,
        _axes,
        _placement,
        _float8,
        _float,
    )
    return [finding for rule in rules for finding in rule(model)]


def name_of(node: "onnx_ir.Node") -> str:
    """Return what a finding calls a node."""
    # The files that quantizers leave have nodes without names.
    return node.name or f"{node.op_type} that gives {node.outputs[0].name}"


def _opset(model: "onnx_ir.Model") -> Iterator[Finding]:
    version = model.graph.opset_imports.get("", 0)
    if not OPSETS[0] <= version <= OPSETS[1]:
        what = f"opset {version}; the parser takes {OPSETS[0]} to {OPSETS[1]}"
        yield Finding("error", "opset", "model", what, "export again with export.onnx, opset = 20")


def _types(model: "onnx_ir.Model") -> Iterator[Finding]:
    import onnx_ir

    known = {
        *(onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.BOOL),
        *(onnx_ir.DataType.INT32, onnx_ir.DataType.INT64, onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8),
    }
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype is not None and value.dtype not in known:
            fix = "take and return float32, float16, int32, int64 or bool"
            yield Finding("error", "types", str(value.name), f"{value.dtype.name} is no type of TensorRT", fix)


def _operators(model: "onnx_ir.Model") -> Iterator[Finding]:
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            what = f"{node.domain}.{node.op_type} is an operator of ONNX Runtime"
            fix = "build from a bundle before the step that put it in (fusion, weight-only or dynamic quantization)"
            yield Finding("error", OPERATORS, name_of(node), what, fix)
        elif node.op_type in INTEGER:
            yield Finding("error", OPERATORS, name_of(node), f"TensorRT has no {node.op_type}", SYMMETRIC)


def _pairs(model: "onnx_ir.Model") -> "Iterator[onnx_ir.Node]":
    return (node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def _constant(node: "onnx_ir.Node", index: int) -> Array | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _zero_points(model: "onnx_ir.Model") -> Iterator[Finding]:
    for node in _pairs(model):
        zero, kind = _constant(node, 2), _kind(node)
        if kind == "int32":
            what = "an int32 bias is quantized; TensorRT adds it in float"
            yield Finding("error", "bias", name_of(node), what, SYMMETRIC)
            continue
        if kind.startswith(("uint", "int16")):
            what = f"quantizes to {kind}, TensorRT would read int8 in its place"
            yield Finding("error", "signed", name_of(node), what, SYMMETRIC)
        if zero is not None and np.any(zero.astype(np.float32)):
            what = "has a zero point that is not 0; TensorRT quantizes symmetrically"
            yield Finding("error", "symmetric", name_of(node), what, SYMMETRIC)


def _kind(node: "onnx_ir.Node") -> str:
    """Return the type that a node quantizes to or from; empty where another node says it."""
    stated = _constant(node, 2) if _constant(node, 2) is not None else _constant(node, 0)
    if stated is not None and (node.op_type == "DequantizeLinear" or len(node.inputs) > 2):
        return str(stated.dtype)
    if node.op_type == "DequantizeLinear" or "output_dtype" in node.attributes:
        return ""
    return "uint8"  # what a QuantizeLinear does that says nothing


def _scales(model: "onnx_ir.Model") -> Iterator[Finding]:
    for node in _pairs(model):
        scale = _constant(node, 1)
        if scale is not None and not (scale.astype(np.float32) > 0).all():
            fix = "calibrate on samples that differ: a constant activation has no range"
            yield Finding("error", "scales", name_of(node), "has a scale that is not above 0", fix)
        if scale is not None and scale.size > 1 and node.op_type == "QuantizeLinear" and _constant(node, 0) is None:
            what = f"has {scale.size} scales for an activation; TensorRT takes one for the tensor"
            yield Finding("error", "per tensor", name_of(node), what, SYMMETRIC)


def _axes(model: "onnx_ir.Model") -> Iterator[Finding]:
    """A weight's scales lie along its output channels."""
    for node in (node for node in model.graph if node.op_type in WEIGHTED):
        source = node.inputs[1].producer() if node.inputs[1] is not None else None
        scale = _constant(source, 1) if source is not None and source.op_type == "DequantizeLinear" else None
        data = _constant(source, 0) if source is not None else None
        if source is None or scale is None or data is None or scale.ndim != 1 or scale.size == 1:
            continue
        axis = source.attributes.get_int("axis", 1) % data.ndim
        wanted = _output_axis(node, data.ndim)
        if axis != wanted:
            what = (
                f"the weight of {name_of(node)} has its scales along axis {axis}, its output channels are axis {wanted}"
            )
            yield Finding("error", "channel axis", name_of(source), what, SYMMETRIC)


def _output_axis(node: "onnx_ir.Node", rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else rank - 1


def _placement(model: "onnx_ir.Model") -> Iterator[Finding]:
    """A product is computed in INT8 only where both of its sides come out of a DequantizeLinear."""
    for node in (node for node in model.graph if node.op_type in WEIGHTED):
        sides = [_dequantized(value) for value in node.inputs[:2]]
        if sides[0] != sides[1]:
            which = "weight" if sides[1] else "activation"
            what = f"only its {which} is quantized, so that it is computed in float"
            fix = f"quantize both sides with quantize.static, or leave {name_of(node)} float with exclude"
            yield Finding("warning", "placement", name_of(node), what, fix)


def _float8(model: "onnx_ir.Model") -> Iterator[Finding]:
    """NVIDIA's "Working with Quantized Types" for TensorRT for RTX knows FP8 for products of matrices alone."""
    for node in (node for node in model.graph if node.op_type in ("Conv", "ConvTranspose")):
        source = _source(node.inputs[1])
        if source is not None and source.op_type == "DequantizeLinear" and _kind(source).startswith("float8"):
            what = "is a convolution in FP8; NVIDIA documents FP8 of TensorRT for RTX for products of matrices alone"
            fix = "where it is to run in TensorRT for RTX, quantize convolutions to INT8 with quantize.static"
            yield Finding("warning", "fp8 convolution", name_of(node), what, fix)


def _dequantized(value: "onnx_ir.Value | None") -> bool:
    node = _source(value)
    return node is not None and node.op_type == "DequantizeLinear"


def _source(value: "onnx_ir.Value | None") -> "onnx_ir.Node | None":
    """Return the node that a value comes from, through those that only carry it."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in CARRIERS:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def precision(path: Path) -> str:
    """Return the lowest precision in the graph: `INT8`, `FP8`, `FP16`, `BF16` or `FP32`, as Triton names it."""
    return _precision(graph.load(path))


def allowed(path: Path) -> str:
    """Return the precision that ONNX Runtime must let TensorRT use for the graph, as Triton's `precision_mode`."""
    lowest = precision(path)
    return "FP32" if lowest == "FP8" else lowest  # FP8 stands in the graph's Q/DQ pairs and nowhere else


def _precision(model: "onnx_ir.Model") -> str:
    import onnx_ir

    kinds = {value.dtype.name for value in model.graph.initializers.values() if value.dtype is not None}
    stated = [node.attributes.get_int("output_dtype", 0) for node in model.graph if node.op_type == "QuantizeLinear"]
    kinds |= {onnx_ir.DataType(kind).name for kind in stated if kind}
    if any(node.op_type == "DequantizeLinear" for node in model.graph):
        return "FP8" if any(kind.startswith("FLOAT8") for kind in kinds) else "INT8"
    return {"FLOAT16": "FP16", "BFLOAT16": "BF16"}.get(next(iter(kinds & {"FLOAT16", "BFLOAT16"}), ""), "FP32")


def _float(model: "onnx_ir.Model") -> Iterator[Finding]:
    if _precision(model) == "FP32":
        what = "is float32 throughout, and a strongly typed engine computes in the types of the graph"
        yield Finding("warning", "precision", "model", what, "quantize it first; quantize.half makes float16")


def refuse(findings: Sequence[Finding], graph: Path, *, partial: bool = False) -> None:
    """Refuse a graph with errors among its findings.

    Args:
        findings: of `check`.
        graph: the file.
        partial: pass operators that TensorRT lacks, which ONNX Runtime is to compute.

    Raises:
        BadGraph: naming the first; its `partial` holds all findings.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if partial:
        errors = [finding for finding in errors if finding.rule != OPERATORS]
    if not errors:
        return
    first, more = errors[0], f" ({len(errors) - 1} more findings)" if len(errors) > 1 else ""
    refusal = BadGraph(f"TensorRT cannot take it: {first.node}: {first.what}{more}", where=str(graph), fix=first.fix)
    refusal.partial = {"findings": document(list(findings))}
    raise refusal


def told(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield a line for each rule: the first node that breaks it, and how many others do."""
    for rule in dict.fromkeys(finding.rule for finding in findings):
        first, *others = [finding for finding in findings if finding.rule == rule]
        yield f"{first.node}{f' and {len(others)} more' if others else ''}: {first.what}"


def document(findings: list[Finding]) -> list[dict[str, Any]]:
    """Return the JSON form."""
    return [vars(finding) for finding in findings]
