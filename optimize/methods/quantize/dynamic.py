"""quantize.dynamic: INT8 weights, and activations whose range is taken from each batch as it comes."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph, table
from optimize.machine import cpu
from optimize.model.errors import BadRecipe
from optimize.step import options
from serve.config.target import TENSORRT, Target

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

# A dynamic convolution (ConvInteger) is slower than the float one on every CPU that was tried, so Conv is not here.
# Gather is an embedding table. ONNX Runtime has no INT8 GRU.
WEIGHTED = ("MatMul", "Gemm", "Gather", "LSTM")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Dynamic:
    """Dynamic INT8: weights int8, activations quantized batch by batch. A GRU stays float: there is no INT8 one."""

    per_channel: bool = Field(default=True, description="One scale for each output channel of a weight.")
    reduce_range: bool | None = options.REDUCE_RANGE
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def suited(config: Dynamic, target: Target) -> Dynamic:
    """Return the config.

    Raises:
        BadRecipe: the target's runtime has no such operators.
    """
    if target.runtime in TENSORRT:
        raise BadRecipe(
            "quantize.dynamic writes integer operators, which TensorRT has not",
            fix="use quantize.static or quantize.fp8",
        )
    return config


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    return graph.names_of(graph.quantizable(subject), WEIGHTED)


def apply(config: Dynamic, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = graph.quantizable(subject)
    graph.refuse_quantized(model, subject, WEIGHTED)
    names = graph.excluded(model, config.exclude)
    graph.refuse_idle(model, WEIGHTED, names)
    own_weights(model)
    reduced = cpu.reduced_range(config.reduce_range, context.target.device)
    table.round_tables(model, names, most=table.REDUCED if reduced else table.MOST)
    graph.save(model, subject)
    quantize = functools.partial(
        quantize_dynamic,
        # The quantizer makes MatMul and Add of a Gemm, under new names.
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
        per_channel=config.per_channel,
        reduce_range=reduced,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[*names, *(f"{name}_MatMul" for name in names), *graph.activation_products(model)],
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
    )
    return graph.rewrite(subject, quantize)


def own_weights(model: "onnx_ir.Model") -> None:
    """Give every Gemm a weight of its own: the quantizer transposes a Gemm's weight in place, whoever else uses it."""
    import onnx_ir

    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        if weight is None or weight.const_value is None or len(list(weight.uses())) == 1:
            continue
        own = onnx_ir.Value(name=f"{weight.name}_of_{node.name}", const_value=weight.const_value)
        model.graph.register_initializer(own)
        node.replace_input_with(1, own)
