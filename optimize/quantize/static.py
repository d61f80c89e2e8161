"""quantize.static: INT8 weights and activations, the ranges of the activations fixed from calibration samples."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.export import graph
from optimize.quantize import calibrate

if TYPE_CHECKING:
    from optimize.step import Context

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
SENSITIVE = ("Softmax", "LayerNormalization", "Attention")
"""Operators that mark a transformer, whose activations have outliers: what lies between its weights stays float."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Static:
    """Static INT8 (Q/DQ): weights int8, activations uint8."""

    calibrator: Literal["minmax", "entropy", "percentile"] = Field(
        default="minmax", description="How the range of an activation is taken from the calibration samples."
    )
    per_channel: bool = Field(default=True, description="One scale for each output channel of a weight.")
    samples: int = Field(default=256, ge=calibrate.FEWEST, description="Calibration samples at most.")
    reduce_range: bool = Field(
        default=False, description="Weights of 7 bits, for CPUs without VNNI, whose 8-bit products overflow."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Globs of node names that stay float.")


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    return graph.names_of(graph.load(subject), WEIGHTED)


def apply(config: Static, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = graph.load(subject)
    graph.refuse_quantized(model, subject)
    present = graph.operators(model)
    kinds = WEIGHTED if present & set(SENSITIVE) else (*WEIGHTED, *BETWEEN)
    batches = calibrate.samples(context.workload, config.samples)
    quantize = functools.partial(
        quantize_static,
        calibration_data_reader=calibrate.reader(batches),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=[kind for kind in kinds if kind in present],
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=graph.excluded(model, config.exclude),
        calibrate_method={
            "minmax": CalibrationMethod.MinMax,
            "entropy": CalibrationMethod.Entropy,
            "percentile": CalibrationMethod.Percentile,
        }[config.calibrator],
        # The product of two activations (attention scores) keeps its precision, and so does what a MatMul returns:
        # ONNX Runtime then runs MatMulIntegerToFloat.
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    return graph.rewrite(subject, quantize)
