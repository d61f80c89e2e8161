"""Retype: numbers of one floating-point type in a graph become those of another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from optimize.graph import graph

if TYPE_CHECKING:
    import onnx_ir


def retype(
    model: "onnx_ir.Model",
    old: "onnx_ir.DataType",
    new: "onnx_ir.DataType",
    exact: "Mapping[str, onnx_ir.Value] | None" = None,
) -> None:
    """Make `new` numbers of all `old` ones that the graph states: constants, fills, and what it casts to; in place.

    Args:
        model: to be changed.
        old: a floating-point type.
        new: another one.
        exact: by name, constants whose numbers `old` could not hold, as they were before.
    """
    import onnx_ir

    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype == old:
            numbers = graph.constant((exact or {}).get(name, value)).astype(np.float32)
            value.const_value = onnx_ir.tensor(numbers.astype(new.numpy()), name=name)
            value.type = onnx_ir.TensorType(new)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes.get_int("to", 0) == old:
            node.attributes["to"] = onnx_ir.AttrInt64("to", int(new))
        filled = node.attributes.get_tensor("value") if node.op_type == "ConstantOfShape" else None
        if filled is not None and filled.dtype == old:
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor(filled.numpy().astype(new.numpy())))
