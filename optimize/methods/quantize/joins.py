"""Joins: where values of very different ranges come together, one INT8 scale for all of them wipes the small ones out.

A detector's boxes in pixels beside its scores, or numbers beside a mask of -1e9: the scale of the large values has no
step left for the small ones. What joins them and what reads them joined stays float.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelathe.tensors import Array, Arrays
from optimize.graph import graph
from optimize.predict import inner

if TYPE_CHECKING:
    import onnx_ir

    Ratios = dict[onnx_ir.Value, float]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PARTS = {"Concat": None, "Where": (1, 2), "ScatterND": (0, 2), "ScatterElements": (0, 2), "Pad": (0, 2)}
"""Operators whose result holds values of all these inputs, each at its own places; None stands for every input."""
SUMS = ("Add", "Sub")
"""Operators that add: a mask among the terms is as good as a part."""
APART, MASK = 16.0, 1e4
"""How many times the smallest range of the parts, or of the terms, the largest is that leaves it under four bits."""
ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
CURVES = ("Sigmoid", "HardSigmoid", "Tanh")
LAYERS = 100.0
"""The same for a layer with weights, whose input stays float with it: of a smaller ratio INT8 costs less than float."""
ONWARD = (
    *("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Sub", "Mul", "Div", "Concat"),
    *("Split", "Slice", "Pad", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast"),
    *("Gather", "Expand", "Tile", "Where"),
)
"""Operators that hand the ranges on that they are given."""


def apart(
    path: Path,
    model: "onnx_ir.Model",
    batches: Iterable[Arrays],
    kept: Sequence[str],
    say: Callable[[str, float], None],
) -> list[str]:
    """Return the names of the nodes that would put values of different ranges under one scale, and `say` so.

    Args:
        path: the float ONNX file.
        model: its graph.
        batches: inputs by name, from which the ranges are taken.
        kept: names of the nodes that stay float anyway.
        say: called with a line of text and a fraction.
    """
    joins = [node for node in model.graph if node.op_type in PARTS or node.op_type in SUMS]
    ranges = _ranges(path, {value for node in joins for value in _parts(node)}, batches)
    layers = set(graph.names_of(model, WEIGHTED)) - set(kept)
    before = _before(model, layers)
    joined: Ratios = {}
    found = []
    for node in model.graph:
        given = max((joined.get(value, 1.0) for value in node.inputs if value is not None), default=1.0)
        made = max(_ratio(node, ranges), 1.0 if node in before else _scaled(node))
        joined.update(dict.fromkeys(node.outputs, max(made, given if node.op_type in ONWARD else 1.0)))
        if max(given, made) >= (LAYERS if node.name in layers else APART) and node.name and node.name not in kept:
            found.append(str(node.name))
    found += _only_for(model, {*found}, layers)
    if found:
        say(f"stays float, where values of different ranges meet: {', '.join(found)}", 0.1)
    return found


def _only_for(model: "onnx_ir.Model", floats: "set[str]", layers: "set[str]") -> list[str]:
    """Return the nodes without weights that nothing but `floats` reads: rounding their results would serve nobody."""
    found: list[str] = []
    for node in reversed(list(model.graph)):
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        # The runtimes make one INT8 operator of a layer and its activation.
        joined = node.op_type in ACTIVATIONS and before is not None and before.name in layers
        users = [user.name for value in node.outputs for user, _ in value.uses()]
        if (
            node.op_type in (*ONWARD, *CURVES)
            and users
            and floats.issuperset(users)
            and not joined
            and node.name not in {*layers, *floats, None}
        ):
            floats.add(str(node.name))
            found.append(str(node.name))
    return found


def _parts(node: "onnx_ir.Node") -> "list[onnx_ir.Value]":
    places = PARTS.get(node.op_type)
    values = node.inputs if places is None else [node.inputs[place] for place in places if place < len(node.inputs)]
    return [value for value in values if value is not None]


def _ranges(path: Path, values: "set[onnx_ir.Value]", batches: Iterable[Arrays]) -> "Ratios":
    """Return the largest magnitude of each of the values that is of floating point numbers."""
    constants = {value: value.const_value for value in values if value.const_value is not None}
    found = {value: _largest(constant.numpy()) for value, constant in constants.items()}
    moving = {str(value.name): value for value in values if value not in constants}
    if not moving:
        return found
    for arrays in inner.values(path, list(moving), batches):
        for name, array in arrays.items():
            found[moving[name]] = max(found.get(moving[name], 0.0), _largest(array))
    return found


def _largest(array: Array) -> float:
    return float(np.abs(array).max(initial=0.0)) if array.dtype.kind == "f" else 0.0


def _ratio(node: "onnx_ir.Node", ranges: "Ratios") -> float:
    """Return how many times the smallest range of what a node joins the largest is; 1 where that is no matter."""
    if node.op_type not in PARTS and node.op_type not in SUMS:
        return 1.0
    reached = [ranges[value] for value in _parts(node) if ranges.get(value, 0.0) > 0]
    ratio = max(reached) / min(reached) if len(reached) > 1 else 1.0
    return ratio if node.op_type in PARTS or ratio >= MASK else 1.0


def _scaled(node: "onnx_ir.Node") -> float:
    """Return the same of a product with a constant that gives each channel a range of its own."""
    constants = [
        value.const_value.numpy()
        for value in node.inputs
        if node.op_type in ("Mul", "Div") and value is not None and value.const_value is not None
    ]
    sizes = np.abs(np.concatenate([array.ravel() for array in constants])) if constants else np.zeros(0)
    sizes = sizes[sizes > 0]
    return float(sizes.max() / sizes.min()) if sizes.size > 1 else 1.0


def _before(model: "onnx_ir.Model", layers: "set[str]") -> "set[onnx_ir.Node]":
    """Return the nodes whose result a layer with weights depends on."""
    found: set[onnx_ir.Node] = set()
    for node in reversed(list(model.graph)):
        if any(user.name in layers or user in found for value in node.outputs for user, _ in value.uses()):
            found.add(node)
    return found
