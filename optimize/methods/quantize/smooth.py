"""quantize.smooth: outliers of activations move into the weights behind them, or past the quantized product in float.

A dense layer computes x W = (x / s) (s W) for any positive s with one value for each input channel. INT8 has one scale
for a whole activation, so a few channels that are a hundred times the others leave those with a bit or two. The weights
have a scale for each output, and room to take over a part (Xiao et al., "SmoothQuant", ICML 2023, arXiv 2211.10438).
The division goes into the normalization or the dense layer that makes x, where nothing else reads x; else it is a Mul.
What still stands out after that are one or two channels, which go through a float product of their own (Dettmers et
al., "LLM.int8()", NeurIPS 2022, arXiv 2208.07339). The results stay the same up to rounding: a quantizer comes after.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from modelathe.tensors import Array
from optimize.graph import graph
from optimize.methods.quantize import calibrate, fold
from optimize.model.errors import NoEffect
from optimize.predict import ranges
from optimize.source import padding

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Context

UNEVEN = 2.0
"""A layer is smoothed whose largest channel is so many times its median one: the others lose a bit to it."""
APART = 3.0
"""A channel goes past the quantized product that is so many times the largest one that does not."""
SMALLEST = 1e-5
"""A channel that never leaves zero has no range; this stands for it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Smooth:
    """Prepare activations for INT8; quantize.dynamic or quantize.static comes after."""

    strength: float = Field(
        default=0.5, gt=0, lt=1, description="How far the range of an activation's channel moves into the weights."
    )
    outliers: int = Field(
        default=4,
        ge=0,
        le=64,
        description="Channels of a layer at most that are multiplied in float, if they are outliers.",
    )
    samples: int = Field(default=128, ge=calibrate.FEWEST, description="Calibration samples at most.")
    exclude: tuple[str, ...] = Field(default=(), description="Globs of node names that stay as they are.")


def needs(config: Smooth) -> tuple[str, ...]:
    """Return which data of the workload the ranges are taken from."""
    return ("calibration",)


def matches(subject: Path) -> list[str]:
    """List the dense layers."""
    return [str(node.name) for nodes in _layers(graph.quantizable(subject), []).values() for node in nodes]


def apply(config: Smooth, subject: Path, context: "Context") -> Path:
    """Smooth the graph in place of its file.

    Raises:
        NoEffect: no activation before a dense layer has outliers.
    """
    model = graph.quantizable(subject)
    kept = graph.excluded(model, config.exclude)
    batches = calibrate.samples(context.workload, config.samples)
    mask = partial(padding.mask, context.workload)
    largest = ranges.by_channel(subject, list(_layers(model, kept)), batches, mask)
    uneven = {name for name, seen in largest.items() if seen.max() >= UNEVEN * max(np.median(seen), SMALLEST)}
    if not uneven:
        raise NoEffect(
            "quantize.smooth: no activation before a dense layer has outliers",
            fix=f"leave it out; it looked at: {', '.join(matches(subject)) or 'nothing in this model'}",
        )
    for name, nodes in _layers(model, kept).items():
        if name in uneven:
            _smooth(model, nodes, largest[name], config, kept)
    model.graph.sort()
    graph.clean(model)
    return graph.save(model, subject)


def _layers(model: "onnx_ir.Model", kept: list[str]) -> dict[str, list["onnx_ir.Node"]]:
    """Return the dense layers by the name of the activation that they read: layers that share one share its scale."""
    names = set(graph.names_of(model, ("MatMul", "Gemm"))) - set(kept)
    layers: dict[str, list[onnx_ir.Node]] = {}
    for node in model.graph:
        if node.name in names and node.inputs[0] is not None and node.inputs[1] is not None:
            weight = node.inputs[1].const_value
            plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            plain = plain and node.attributes.get_int("transA", 0) == 0 and not node.inputs[0].is_initializer()
            if weight is not None and len(weight.shape) == 2 and plain:
                layers.setdefault(str(node.inputs[0].name), []).append(node)
    return layers


def _smooth(
    model: "onnx_ir.Model", nodes: list["onnx_ir.Node"], largest: Array, config: Smooth, kept: list[str]
) -> None:
    """Scale the activation that `nodes` read, and their weights against it."""
    import onnx_ir

    first, activation = nodes[0], nodes[0].inputs[0]
    weights = np.max([np.abs(_by_input(node)).max(axis=1) for node in nodes], axis=0)
    scale = np.maximum(largest, SMALLEST) ** config.strength / np.maximum(weights, SMALLEST) ** (1 - config.strength)
    # Channels are scaled down alone: one scaled up becomes an outlier where it exceeds what calibration saw of it.
    scale = np.maximum(scale / np.median(scale), 1)
    outliers = _outliers(largest / scale, config.outliers)
    factor = 1 / scale
    alone = activation is not None and {user for user, _ in activation.uses()} <= set(nodes)
    if activation is not None and alone and not outliers.size and fold.into_producer(model, activation, factor, kept):
        for node in nodes:
            _replace(model, node, activation, scale, None, outliers)
        return
    factor[outliers] = 0
    smoothed = onnx_ir.node("Mul", [activation, _constant(model, f"{first.name}_factor", factor)])
    smoothed.name, smoothed.outputs[0].name = f"{first.name}_smoothing{graph.FLOAT}", f"{first.name}_smoothed"
    model.graph.insert_before(first, smoothed)
    picked = None
    if outliers.size:
        index = _constant(model, f"{first.name}_channels", outliers)
        picked = onnx_ir.node("Gather", [activation, index], attributes={"axis": -1})
        picked.name, picked.outputs[0].name = f"{first.name}_pick{graph.FLOAT}", f"{first.name}_picked"
        model.graph.insert_before(first, picked)
    for node in nodes:
        _replace(model, node, smoothed.outputs[0], scale, picked.outputs[0] if picked else None, outliers)


def _outliers(largest: Array, most: int) -> Array:
    """Return the channels, `most` at most, that stand out from all others."""
    order = np.argsort(-largest, kind="stable")
    limit = largest[order[most]] if most < len(order) else np.inf
    return np.sort(np.array([channel for channel in order[:most] if largest[channel] > APART * limit], np.int64))


def _replace(
    model: "onnx_ir.Model",
    node: "onnx_ir.Node",
    smoothed: "onnx_ir.Value",
    scale: Array,
    picked: "onnx_ir.Value | None",
    outliers: Array,
) -> None:
    """Let `node` read the smoothed activation, and add the float product of the channels that it lacks."""
    import onnx_ir

    weight = _by_input(node)
    scaled = weight * scale[:, None]
    constant = _constant(model, f"{node.name}_scaled", scaled.T if _transposed(node) else scaled)
    inputs = [smoothed, constant, *node.inputs[2:]]
    nodes = [onnx_ir.node(node.op_type, inputs, attributes=node.attributes, name=node.name)]
    if picked is not None:
        rest = _constant(model, f"{node.name}_outliers", weight[outliers])
        nodes.append(onnx_ir.node("MatMul", [picked, rest], name=f"{node.name}_outliers{graph.FLOAT}"))
        nodes.append(onnx_ir.node("Add", [each.outputs[0] for each in nodes], name=f"{node.name}_total{graph.FLOAT}"))
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def _by_input(node: "onnx_ir.Node") -> Array:
    """Return the weight of a dense layer as [inputs, outputs]."""
    weight: Array = graph.constant(node.inputs[1])
    return weight.T if _transposed(node) else weight


def _transposed(node: "onnx_ir.Node") -> bool:
    return bool(node.attributes.get_int("transB", 0))


def _constant(model: "onnx_ir.Model", name: str, array: Array) -> "onnx_ir.Value":
    import onnx_ir

    kind = np.int64 if array.dtype.kind == "i" else np.float32
    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(array, kind)))
    model.graph.register_initializer(value)
    return value
