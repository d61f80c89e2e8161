"""quantize.static: INT8 weights and activations, the ranges of the activations fixed from calibration samples."""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph, pooling, table
from optimize.machine import cpu
from optimize.methods.quantize import calibrate, joins
from optimize.step import options
from serve.config.target import TENSORRT

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
"""Operators that carry the weights."""
BETWEEN = (
    *(
        "Relu",
        "Clip",
        "LeakyRelu",
        "Sigmoid",
        "HardSigmoid",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Add",
        "Mul",
    ),
    *("Concat", "Split", "Slice", "Pad", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
)
"""Operators that a convolutional net may have between those, and that ONNX Runtime runs in INT8."""
SENSITIVE = ("Softmax", "LayerNormalization", "SkipLayerNormalization", "MultiHeadAttention", "Attention")
"""Operators that mark a transformer, whose activations have outliers: what lies between its weights stays float."""

NARROW_CHANNELS, NARROW_PRODUCTS = 3, 100
"""Up to so many input channels, and with fewer products than this for a point, a convolution is faster in float."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Static:
    """Static INT8 (Q/DQ): weights int8, activations uint8 or int8."""

    calibrator: Literal["minmax", "entropy", "percentile"] = Field(
        default="minmax", description="How the range of an activation is taken from the calibration samples."
    )
    activations: Literal["auto", "uint8", "int8"] = options.ACTIVATIONS
    per_channel: bool = Field(default=True, description="One scale for each output channel of a weight.")
    samples: int = calibrate.SAMPLES
    reduce_range: bool | None = options.REDUCE_RANGE
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def needs(config: Static) -> tuple[str, ...]:
    """Return which data of the workload the ranges are taken from."""
    return ("calibration",)


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    model = graph.quantizable(subject)
    grouped = grouped_transposes(model)
    return [name for name in graph.names_of(model, WEIGHTED) if name not in grouped]


def apply(config: Static, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = graph.quantizable(subject)
    graph.refuse_quantized(model, subject, WEIGHTED)
    present = graph.operators(model) - {"Gather"}
    kinds = WEIGHTED if present & set(SENSITIVE) else (*WEIGHTED, *BETWEEN)
    names = [*graph.excluded(model, config.exclude), *narrow_convolutions(model), *grouped_transposes(model)]
    graph.refuse_idle(model, WEIGHTED, names)
    tables = graph.names_of(model, ("Gather",))
    reduced = cpu.reduced_range(config.reduce_range, context.target.device)
    engine = context.target.runtime in TENSORRT
    table.round_tables(model, names, most=table.REDUCED if reduced else table.MOST, pairs=engine)
    names += [*pooling.pool_first(model, names), *tables, *graph.activation_products(model), *biases(model)]
    symmetric = cpu.signed(config.activations, context.target.device)
    graph.save(model, subject)
    type_inputs(subject)
    batches = list(calibrate.samples(context.workload, config.samples))
    names += joins.apart(subject, model, batches, names, context.progress)
    quantize = functools.partial(
        quantize_static,
        calibration_data_reader=calibrate.reader(batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=[kind for kind in kinds if kind in present],
        per_channel=config.per_channel,
        reduce_range=reduced,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=names,
        calibrate_method={
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[config.calibrator],
        # What a dense layer returns keeps its precision: ONNX Runtime quantizes it where the next layer wants it so.
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            # TensorRT takes no zero points and no INT32 bias.
            "ActivationSymmetric": symmetric,
            "QuantizeBias": not symmetric,
            # Histograms of one batch after the other: together they would have to be of one length.
            "CalibStridedMinMax": None if config.calibrator == "minmax" else 1,
        },
    )
    return graph.rewrite(subject, quantize, shield_float)


def narrow_convolutions(model: "onnx_ir.Model") -> list[str]:
    """Return the convolutions that are faster in float: over so few channels, with so few products for a point.

    ONNX Runtime gathers the points of an INT8 convolution tap by tap, which for so few channels takes longer than the
    multiplications.
    """
    found = []
    for node in model.graph:
        weight = node.inputs[1].const_value if node.op_type == "Conv" and node.inputs[1] is not None else None
        if weight is not None:
            outputs, channels, *kernel = weight.shape.numpy()
            depthwise = channels == 1 and outputs > 1 and node.attributes.get_int("group", 1) > 1
            if channels <= NARROW_CHANNELS and channels * math.prod(kernel) < NARROW_PRODUCTS and not depthwise:
                found.append(str(node.name))
    return found


def grouped_transposes(model: "onnx_ir.Model") -> list[str]:
    """Return the transposed convolutions in groups, for which the quantizer has no scale for each channel."""
    return [
        str(node.name)
        for node in model.graph
        if node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) > 1
    ]


def type_inputs(path: Path) -> None:
    """Write into the file that what a layer with float weights reads is float.

    Shape inference does not get past an operator that ONNX does not know, and the quantizer then leaves what it reads.
    """
    import onnx

    names = set(graph.names_of(graph.quantizable(path), WEIGHTED[:-1]))
    model = onnx.load(path, load_external_data=False)
    read = {node.input[0] for node in model.graph.node if node.name in names}
    for name in sorted(read - {value.name for value in model.graph.input}):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)


def biases(model: "onnx_ir.Model") -> list[str]:
    """Return the sums of a MatMul and a constant: what a dense layer returns keeps its precision with its bias too."""
    return [
        str(node.name)
        for node in model.graph
        if node.op_type == "Add"
        and any(value is not None and value.is_initializer() for value in node.inputs)
        and any(before is not None and before.op_type == "MatMul" for before in node.predecessors())
    ]


def shield_float(model: "onnx_ir.Model") -> None:
    """Put a Sum of one value after every layer that stays float between quantized ones.

    ONNX Runtime quantizes the weight of such a layer by itself where its result is quantized next. It does not look
    through a Sum, and removes none.
    """
    import onnx_ir

    for node in list(model.graph):
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.inputs[1] is not None:
            before = node.inputs[0].producer() if node.inputs[0] is not None else None
            if before is None or before.op_type != "DequantizeLinear" or not node.inputs[1].is_initializer():
                continue
            users = list(node.outputs[0].uses())
            shield = onnx_ir.node("Sum", [node.outputs[0]])
            for user, index in users:
                user.replace_input_with(index, shield.outputs[0])
            if users:
                model.graph.insert_after(node, shield)
