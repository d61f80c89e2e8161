"""Table: an embedding table in INT8, one scale a row, in standard operators."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimize.export import graph

if TYPE_CHECKING:
    import onnx_ir

SMALLEST = 1e-8
"""Stands for the magnitude of a row of zeros."""


def round_tables(model: "onnx_ir.Model", kept: Sequence[str]) -> None:
    """Round every embedding table but those of the nodes `kept`, in place.

    ONNX Runtime's own quantizer has one scale for a whole table, which costs a sentence encoder more than its products.
    """
    names = set(graph.names_of(model, ("Gather",))) - set(kept)
    for node in [node for node in model.graph if node.name in names]:
        round_rows(model, node)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def round_rows(model: "onnx_ir.Model", node: "onnx_ir.Node") -> None:
    """Let the Gather `node` look rows of INT8 numbers up instead of floats, and the scale of each row beside them."""
    import onnx_ir

    table = graph.constant(node.inputs[0])
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), SMALLEST).astype(np.float32) / 127
    arrays = {"rows": np.rint(table / scale).astype(np.int8), "scales": scale}
    values = {key: onnx_ir.Value(name=f"{node.name}_{key}", const_value=onnx_ir.tensor(arrays[key])) for key in arrays}
    for value in values.values():
        model.graph.register_initializer(value)
    rows, scales = (
        onnx_ir.node("Gather", [value, node.inputs[1]], name=f"{node.name}_{key}{graph.FLOAT}")
        for key, value in values.items()
    )
    numbers = onnx_ir.node("Cast", [rows.outputs[0]], attributes={"to": int(onnx_ir.DataType.FLOAT)})
    product = onnx_ir.node("Mul", [numbers.outputs[0], scales.outputs[0]], name=node.name)
    nodes = [rows, scales, numbers, product]
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, product.outputs)
