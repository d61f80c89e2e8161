"""quantize.nncf: INT8 weights and activations by Intel's NNCF, whose SmoothQuant and bias correction suit transformers.

Kozlov et al., "Neural Network Compression Framework for fast model inference" (arXiv 2002.08679); Xiao et al.,
"SmoothQuant" (arXiv 2211.10438). The result is a Q/DQ graph, which OpenVINO and ONNX Runtime both take.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from optimize.graph import graph, table
from optimize.machine import cpu, extra
from optimize.methods.quantize import calibrate, joins
from optimize.model.errors import BadGraph
from optimize.step import options
from serve.config.target import TENSORRT

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")
"""Operators that carry the weights."""
HALVED = 63.5
"""What the largest weight is in a scale of 7 bits; NNCF rounds it to 64."""
TRANSFORMER = {"Softmax", "LayerNormalization", "SkipLayerNormalization", "Attention", "MultiHeadAttention"}
"""Operators that mark a transformer."""
CONVOLUTIONS = {"Conv", "ConvTranspose"}
"""Operators whose biases NNCF's fast correction gets wrong: it feeds them an image of one flat colour."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Nncf:
    """Static INT8 (Q/DQ) by NNCF: weights int8, activations uint8, for a GPU int8 around zero."""

    model: Literal["auto", "transformer", "plain"] = Field(
        default="auto",
        description="What NNCF takes the model for; auto looks for softmax, layer normalization and attention.",
    )
    preset: Literal["auto", "performance", "mixed"] = Field(
        default="auto",
        description="Ranges of activations: performance for symmetric ones, mixed for asymmetric ones where a layer's "
        "output is not a ReLU's; auto is mixed for transformers, performance for others.",
    )
    bias_correction: Literal["auto", "fast", "accurate", "none"] = Field(
        default="auto",
        description="How biases make up for the rounding of weights. fast takes an image for one flat colour; auto is "
        "accurate where there are convolutions, else fast.",
    )
    reduce_range: bool | None = options.REDUCE_RANGE
    samples: int = calibrate.SAMPLES
    exclude: tuple[str, ...] = options.EXCLUDED_NODES
    partial: bool = options.PARTIAL


def needs(config: Nncf) -> tuple[str, ...]:
    """Return which data of the workload the ranges are taken from.

    Raises:
        MissingExtra: NNCF is not installed.
    """
    extra.require("openvino")
    return ("calibration",)


def matches(subject: Path) -> list[str]:
    """List the nodes with weights that can be quantized."""
    return graph.names_of(graph.quantizable(subject), WEIGHTED)


def apply(config: Nncf, subject: Path, context: "Context") -> Path:
    """Quantize the graph in place of its file."""
    model = graph.quantizable(subject)
    graph.refuse_quantized(model, subject)
    names = graph.excluded(model, config.exclude)
    graph.refuse_idle(model, WEIGHTED, names)
    # With an attention's products in int8, OpenVINO 2026.4.1 was seen to answer wrongly where it computes the rest in
    # bfloat16 (MiniLM, 50 texts of 32 tokens), and in uint8 they were slower than in bfloat16.
    names += graph.activation_products(model)
    operators = graph.operators(model)
    transformer = config.model == "transformer" or (config.model == "auto" and bool(operators & TRANSFORMER))
    correction = config.bias_correction
    if correction == "auto":
        correction = "accurate" if operators & CONVOLUTIONS else "fast"
    engine, symmetric = context.target.runtime in TENSORRT, cpu.signed("auto", context.target.device)
    preset = "performance" if config.preset == "auto" and symmetric else config.preset
    batches = list(calibrate.samples(context.workload, config.samples))
    # It has one scale for a whole table, and so would write one that a product reads too a second time.
    reduced = cpu.reduced_range(config.reduce_range, context.target.device)
    tables = [*names, *table.single(model)]
    table.round_tables(model, tables, most=HALVED if reduced else table.MOST, pairs=engine)
    graph.save(model, subject)
    names += joins.apart(subject, model, batches, names, context.progress)

    def quantize(source: str, destination: str, correction: str) -> None:
        import nncf
        import onnx

        made = nncf.quantize(
            onnx.load(source),
            nncf.Dataset(batches),
            preset=None if preset == "auto" else nncf.QuantizationPreset(preset),
            subset_size=len(batches),
            fast_bias_correction=correction == "fast",
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(names=names),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if reduced else None,
                disable_bias_correction=correction == "none",
            ),
        )
        onnx.save(made, destination)

    mend = center if symmetric else unsign
    try:
        return graph.rewrite(subject, partial(quantize, correction=correction), mend)
    except BadGraph as failure:
        if correction != "accurate":
            raise
        # It loses a layer where two read one value, as in a residual block or a loop.
        context.progress(f"quantize.nncf: {failure.what} with the accurate bias correction; it takes the fast one", 0.0)
        return graph.rewrite(subject, partial(quantize, correction="fast"), mend)


def unsign(model: "onnx_ir.Model") -> None:
    """Make the int8 activations of a Q/DQ graph uint8, their zero points 128 higher: the same values, in place.

    ONNX Runtime on a CPU does not fuse every product of int8 activations.
    """
    for node, users in _rounded(model):
        zero = graph.constant(node.inputs[2])
        if zero.dtype == np.int8:
            _set(model, [node, *users], 2, (zero.astype(np.int16) + 128).astype(np.uint8))


def center(model: "onnx_ir.Model") -> None:
    """Make every activation of a Q/DQ graph int8 around zero, over the larger half of its range, in place.

    TensorRT takes nothing else, and NNCF makes uint8 of what is never negative.
    """
    for node, users in _rounded(model):
        zero = graph.constant(node.inputs[2])
        limits = np.iinfo(zero.dtype)
        steps = max(limits.max - int(zero), int(zero) - limits.min)
        if zero.dtype != np.int8 or zero != 0:
            _set(model, [node, *users], 1, (graph.constant(node.inputs[1]) * (steps / 127)).astype(np.float32))
            _set(model, [node, *users], 2, np.int8(0))


def _rounded(model: "onnx_ir.Model") -> "list[tuple[onnx_ir.Node, list[onnx_ir.Node]]]":
    """Return each QuantizeLinear with one stated zero point, and the DequantizeLinears that alone read it."""
    found = []
    for node in model.graph:
        users = [user for user, _ in node.outputs[0].uses()]
        stated = node.op_type == "QuantizeLinear" and len(node.inputs) == 3 and graph.constant(node.inputs[2]).size == 1
        inside = all(user.op_type == "DequantizeLinear" for user in users) and not node.outputs[0].is_graph_output()
        if stated and inside:
            found.append((node, users))
    return found


def _set(model: "onnx_ir.Model", nodes: "Sequence[onnx_ir.Node]", index: int, array: Any) -> None:
    """Give nodes another scale (1) or zero point (2)."""
    import onnx_ir

    value = onnx_ir.Value(name=f"{nodes[0].outputs[0].name}_{index}", const_value=onnx_ir.tensor(np.asarray(array)))
    model.graph.register_initializer(value)
    for node in nodes:
        node.replace_input_with(index, value)
        node.attributes.pop("output_dtype", None)
