"""Fold: a factor for each channel of an activation goes into the node that makes it, where it costs nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelathe.tensors import Array
from optimize.graph import graph

if TYPE_CHECKING:
    import onnx_ir

PARAMETERS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
    "Mul": (0, 1),
    "MatMul": (1,),
    "Gemm": (1, 2),
    "Add": (0, 1),
    "Relu": (),
}
"""Which inputs of an operator have the channels of its first output."""
ONWARD = ("Add", "Relu")
"""Operators that need what they are given scaled too."""


def into_producer(model: "onnx_ir.Model", value: "onnx_ir.Value", factor: Array, kept: Sequence[str]) -> bool:
    """Multiply the channels of `value` in the constants of the nodes that make it, in place.

    Args:
        model: its graph is changed.
        value: the activation, its channels last; whatever reads it reads the product afterwards.
        factor: float [channels], above 0.
        kept: names of nodes that may not be changed.

    Returns:
        False, and nothing is changed, where the node that makes it has no constant for each channel.
    """
    node = value.producer()
    if node is None or value.is_graph_output() or node.name in kept or value is not node.outputs[0]:
        return False
    places = [place for place in PARAMETERS.get(node.op_type, ()) if place < len(node.inputs) and node.inputs[place]]
    constants = [place for place in places if _fits(node, place, len(factor))]
    if node.op_type in ONWARD:
        (before, *others) = [source for source in node.inputs if source is not None and source.const_value is None]
        if others or len(list(before.uses())) > 1 or not into_producer(model, before, factor, kept):
            return False
    elif not constants or (node.op_type != "Mul" and constants != places):
        return False
    for place in constants:
        _scale(model, node, place, factor)
    return True


def _fits(node: "onnx_ir.Node", place: int, channels: int) -> bool:
    """Say whether the input is a constant with one number, or one row of a weight, for each channel."""
    value = node.inputs[place]
    if value is None or value.const_value is None:
        return False
    shape = value.const_value.shape.numpy()
    if node.op_type in ("MatMul", "Gemm") and place == 1:
        return len(shape) == 2 and shape[_channel_axis(node)] == channels
    return value.const_value.size in (1, channels) and (not shape or shape[-1] == value.const_value.size)


def _channel_axis(node: "onnx_ir.Node") -> int:
    return 0 if node.attributes.get_int("transB", 0) else 1


def _scale(model: "onnx_ir.Model", node: "onnx_ir.Node", place: int, factor: Array) -> None:
    import onnx_ir

    array = graph.constant(node.inputs[place])
    rows = node.op_type == "Gemm" and place == 1 and _channel_axis(node) == 0
    scaled = (array * (factor[:, None] if rows else factor)).astype(np.float32)
    value = onnx_ir.Value(name=f"{node.name}_folded_{place}", const_value=onnx_ir.tensor(scaled))
    model.graph.register_initializer(value)
    node.replace_input_with(place, value)
