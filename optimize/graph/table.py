"""Table: an embedding table in INT8, one scale a row, in standard operators."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimize.graph import graph, share

if TYPE_CHECKING:
    import onnx_ir

SMALLEST = 1e-8
"""Stands for the magnitude of a row of zeros."""
MOST, REDUCED = 127, 64
"""The largest number in INT8, and the one that ONNX Runtime's quantizer leaves to weights of 7 bits."""


def single(model: "onnx_ir.Model") -> list[str]:
    """Return the names of the Gathers whose table nothing else reads, in this form or another."""
    tied = _tied(model)
    names = set(graph.names_of(model, ("Gather",)))
    return [str(node.name) for node in model.graph if node.name in names and node.inputs[0] not in tied]


def round_tables(model: "onnx_ir.Model", kept: Sequence[str], *, most: float = MOST, pairs: bool = False) -> None:
    """Round every embedding table but those of the nodes `kept`, in place.

    ONNX Runtime's own quantizer has one scale for a whole table, which costs a sentence encoder more than its products.

    Args:
        model: its graph is changed.
        kept: names of nodes.
        most: the largest number that products have in their weights; a table that is such a weight too gets the same
            numbers, so that both are one.
        pairs: as `round_rows`.
    """
    names = set(graph.names_of(model, ("Gather",))) - set(kept)
    tied = _tied(model) if most != MOST else set()
    for node in [node for node in model.graph if node.name in names]:
        round_rows(model, node, most if node.inputs[0] in tied else MOST, pairs=pairs)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _tied(model: "onnx_ir.Model") -> "set[onnx_ir.Value]":
    """Return the weights that a product reads too, as they are, transposed or in a copy."""
    read = {
        table for table in model.graph.initializers.values() if {user.op_type for user, _ in table.uses()} > {"Gather"}
    }
    return read | {table for table, _, _ in share.twins(model)}


def round_rows(model: "onnx_ir.Model", node: "onnx_ir.Node", most: float = MOST, *, pairs: bool = False) -> None:
    """Let the Gather `node` read a table of INT8 numbers with a scale for each row, in place.

    Args:
        model: has the node.
        node: its name stays, with the node that gives the rows.
        most: the largest number.
        pairs: put a DequantizeLinear between table and Gather, the only form in which TensorRT takes INT8 numbers; else
            rows are looked up as numbers and widened, so that the table stays small in memory too.
    """
    import onnx_ir

    table = graph.constant(node.inputs[0])
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), SMALLEST).astype(np.float32) / most
    arrays = {"rows": np.rint(table / scale).astype(np.int8), "scales": scale[:, 0] if pairs else scale}
    values = {key: onnx_ir.Value(name=f"{node.name}_{key}", const_value=onnx_ir.tensor(arrays[key])) for key in arrays}
    for value in values.values():
        model.graph.register_initializer(value)
    nodes = (_dequantized if pairs else _widened)(node, *values.values())
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)


def _dequantized(node: "onnx_ir.Node", rows: "onnx_ir.Value", scales: "onnx_ir.Value") -> "list[onnx_ir.Node]":
    import onnx_ir

    floats = onnx_ir.node("DequantizeLinear", [rows, scales], attributes={"axis": 0})
    return [floats, onnx_ir.node("Gather", [floats.outputs[0], node.inputs[1]], name=node.name)]


def _widened(node: "onnx_ir.Node", rows: "onnx_ir.Value", scales: "onnx_ir.Value") -> "list[onnx_ir.Node]":
    import onnx_ir

    looked_up = [
        onnx_ir.node("Gather", [value, node.inputs[1]], name=f"{node.name}_{key}{graph.FLOAT}")
        for key, value in (("rows", rows), ("scales", scales))
    ]
    numbers = onnx_ir.node("Cast", [looked_up[0].outputs[0]], attributes={"to": int(onnx_ir.DataType.FLOAT)})
    product = onnx_ir.node("Mul", [numbers.outputs[0], looked_up[1].outputs[0]], name=node.name)
    return [*looked_up, numbers, product]
