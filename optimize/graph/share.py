"""Share: a weight that a model uses in several forms, as a table and turned as a head, stands in its file once.

A runtime computes the other forms when it loads the file. Quantizers look through no Transpose: they get every form
written out (`own`).
"""

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from modelathe.tensors import Array

if TYPE_CHECKING:
    import onnx_ir

    Folds = Callable[[onnx_ir.Node], bool | None]

SMALLEST = 4096
"""Numbers below which a constant costs more to compute than to write down."""
RUN = ("Cast", "QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan")
"""Operators that stay where they are, constant inputs or not: stored in few bits, a weight is to stay so."""


def folds(model: "onnx_ir.Model") -> "Folds":
    """Return what says False of each node whose result would stand in the file beside the weight that it comes from."""
    kept = _in_use(model)

    def fold(node: "onnx_ir.Node") -> bool | None:
        return False if any(value in kept for value in node.inputs) and not _is_small(node) else None

    return fold


def _is_small(node: "onnx_ir.Node") -> bool:
    shape = node.outputs[0].shape
    known = shape is not None and shape.is_static() and math.prod(shape.numpy()) < SMALLEST
    return known or node.op_type in ("Shape", "Size")


def _in_use(model: "onnx_ir.Model") -> "set[onnx_ir.Value | None]":
    """Return the weights that something reads which depends on the inputs."""
    weights = {value for value in model.graph.initializers.values() if value.const_value is not None}
    known = {*weights, None}
    for node in model.graph:
        if node.op_type not in RUN and all(value in known for value in node.inputs):
            known.update(node.outputs)
    large = (value for value in weights if value.const_value is not None and value.const_value.size >= SMALLEST)
    return {value for value in large if any(user.outputs[0] not in known for user, _ in value.uses())}


def own(model: "onnx_ir.Model") -> "onnx_ir.Model":
    """Write every form of a shared weight out, in place, and return the model."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    def fold(node: "onnx_ir.Node") -> bool | None:
        return False if node.op_type in RUN else None

    optimizer.fold_constants(model, input_size_limit=10**9, output_size_limit=10**9, should_fold=fold)
    passes.RemoveUnusedNodesPass()(model)
    return model


def twins(model: "onnx_ir.Model") -> "list[tuple[onnx_ir.Value, onnx_ir.Value, bool]]":
    """Return pairs of weights with the same numbers, and whether the second has them transposed.

    Axes of size 1 aside, weights have two axes. A Gather's table comes first.
    """
    found: dict[tuple[str, str], onnx_ir.Value] = {}
    pairs = []
    for value in sorted(model.graph.initializers.values(), key=lambda value: not _is_table(value)):
        tensor = value.const_value
        array = tensor.numpy().squeeze() if tensor is not None and tensor.size >= SMALLEST else np.zeros(0)
        if tensor is None or array.ndim != 2 or value.is_graph_output():
            continue
        keys = [_key(each, str(tensor.dtype)) for each in (array, array.T)]
        known = [key in found for key in keys]
        if any(known):
            pairs.append((found[keys[known.index(True)]], value, not known[0]))
        else:
            found[keys[0]] = value
    return pairs


def _is_table(value: "onnx_ir.Value") -> bool:
    return any(user.op_type == "Gather" for user, _ in value.uses())


def _key(array: Array, dtype: str) -> tuple[str, str]:
    data = np.ascontiguousarray(array)
    return f"{dtype}{data.shape}", hashlib.blake2b(data.view(np.uint8).data).hexdigest()


def join(model: "onnx_ir.Model") -> None:
    """Let each second weight of a pair be computed from the first, in place."""
    import onnx_ir

    for source, value, transposed in twins(model):
        result, nodes = source, list[onnx_ir.Node]()
        for kind, given in _way(source, value, transposed):
            if kind == "Reshape":
                shape = onnx_ir.Value(name=f"{value.name}_{len(nodes)}", const_value=onnx_ir.tensor(given))
                model.graph.register_initializer(shape)
                nodes.append(onnx_ir.node(kind, [result, shape]))
            else:
                nodes.append(onnx_ir.node(kind, [result], attributes={"perm": [1, 0]}))
            result = nodes[-1].outputs[0]
            result.name = f"{value.name}_from_{len(nodes)}"
        onnx_ir.convenience.replace_all_uses_with(value, result)
        model.graph.insert_before(model.graph[0], nodes)
        del model.graph.initializers[str(value.name)]


def _way(source: "onnx_ir.Value", value: "onnx_ir.Value", transposed: bool) -> "list[tuple[str, Array]]":
    """Return the operators, and the shapes that they are given, that lead from one weight to the other."""
    before, after = (
        np.array(each.const_value.numpy().shape) for each in (source, value) if each.const_value is not None
    )
    way = []
    if transposed and len(before) != 2:
        way.append(("Reshape", before[before > 1]))
    if transposed:
        way.append(("Transpose", before))
    if len(after) != 2 or (not transposed and len(before) != 2):
        way.append(("Reshape", after))
    return way
