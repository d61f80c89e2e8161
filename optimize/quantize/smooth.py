"""Smoothing: activation channels with outliers are scaled down, and the weights behind them up, before quantization.

A dense layer computes x W = (x / s) (s W) for any positive s with one value for each input channel. INT8 has one scale
for a whole activation, so a few channels that are a hundred times the others leave those with a bit or two. The weights
have a scale for each output, and room to take over a part (Xiao et al., "SmoothQuant", ICML 2023, arXiv 2211.10438).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loadtest.tensors import Array, Arrays
from optimize.errors import NoEffect
from optimize.export import graph

if TYPE_CHECKING:
    import onnx_ir

SAMPLES = 128
"""Calibration samples that the activations' ranges are taken from."""
OUTLIER = 4.0
"""A layer is smoothed whose largest channel is so many times its median one: the others lose two bits to it."""
SMALLEST = 1e-5
"""A channel that never leaves zero has no range; this stands for it."""


def smooth(path: Path, batches: Iterable[Arrays], strength: float) -> None:
    """Smooth the file's dense layers whose input has outliers, in place; results stay the same up to rounding.

    Args:
        path: a float ONNX file.
        batches: calibration inputs by name.
        strength: in (0, 1): how much of a channel's range moves into the weights.

    Raises:
        NoEffect: no activation before a dense layer has outliers.
    """
    import onnx_ir

    largest = _largest(path, batches)
    uneven = {name for name, seen in largest.items() if seen.max() >= OUTLIER * max(np.median(seen), SMALLEST)}
    if not uneven:
        raise NoEffect("smooth: no activation before a dense layer has outliers", fix="leave smooth out")
    model = graph.load(path)
    for name, nodes in _layers(model).items():
        if name not in uneven:
            continue
        weights = np.max([np.abs(_by_input(node)).max(axis=1) for node in nodes], axis=0)
        scale = np.maximum(largest[name], SMALLEST) ** strength / np.maximum(weights, SMALLEST) ** (1 - strength)
        factor = _constant(model, f"{name}_smoothing", 1 / scale)
        smoothed = onnx_ir.node("Mul", [nodes[0].inputs[0], factor], name=f"{nodes[0].name}_smoothing")
        smoothed.outputs[0].name = f"{name}_smoothed"
        model.graph.insert_before(nodes[0], smoothed)
        for node in nodes:
            scaled = _by_input(node) * scale[:, None]
            weight = _constant(model, f"{node.name}_smoothed", scaled.T if _transposed(node) else scaled)
            node.replace_input_with(0, smoothed.outputs[0])
            node.replace_input_with(1, weight)
    model.graph.sort()
    graph.clean(model)
    graph.save(model, path)


def _layers(model: "onnx_ir.Model") -> dict[str, list["onnx_ir.Node"]]:
    """Return the dense layers by the name of the activation that they read: layers that share one share its scale."""
    layers: dict[str, list[onnx_ir.Node]] = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm") and node.inputs[0] is not None and node.inputs[1] is not None:
            weight = node.inputs[1].const_value
            plain = node.attributes.get_int("transA", 0) == 0
            if weight is not None and len(weight.shape) == 2 and plain and not node.inputs[0].is_initializer():
                layers.setdefault(str(node.inputs[0].name), []).append(node)
    return layers


def _largest(path: Path, batches: Iterable[Arrays]) -> dict[str, Array]:
    """Return the largest magnitude of every channel over `batches`, by the name of the activation."""
    import onnx_ir

    from optimize.predict import OnnxPredictor

    model = graph.load(path)
    names = list(_layers(model))
    for nodes in _layers(model).values():
        value = nodes[0].inputs[0]
        if value is not None and not value.is_graph_output() and not value.is_graph_input():
            value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    opened = graph.save(model, path.with_name(f".opened-{path.name}"))
    largest: dict[str, Array] = {}
    with OnnxPredictor(opened) as predictor:
        for batch in batches:
            values = {**batch, **predictor.predict(batch)}
            for name in names:
                seen = np.abs(values[name]).reshape(-1, values[name].shape[-1]).max(axis=0)
                largest[name] = np.maximum(largest.get(name, seen), seen)
    opened.unlink()
    return largest


def _by_input(node: "onnx_ir.Node") -> Array:
    """Return the weight of a dense layer as [inputs, outputs]."""
    weight: Array = graph.constant(node.inputs[1])
    return weight.T if _transposed(node) else weight


def _transposed(node: "onnx_ir.Node") -> bool:
    return bool(node.attributes.get_int("transB", 0))


def _constant(model: "onnx_ir.Model", name: str, array: Array) -> "onnx_ir.Value":
    import onnx_ir

    value = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(np.ascontiguousarray(array, np.float32)))
    model.graph.register_initializer(value)
    return value
