"""Emulate: a graph for a GPU as a CPU can compute it, with the same numbers, as far as a CPU has them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from optimize.graph import graph
from optimize.graph.retype import retype
from serve.repository import scratch

if TYPE_CHECKING:
    import onnx_ir


@contextlib.contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Give the path of a file that ONNX Runtime computes on a CPU: that of the graph, or of a copy while it is open.

    ONNX Runtime has hardly an operator in bfloat16 there. In the copy they compute in float32, and each result is
    rounded to bfloat16.
    """
    # A graph that only stores weights in it has no such value between its nodes.
    rounded = _narrow_values(path)
    if not rounded:
        yield path
        return
    with scratch.folder() as place:
        copy, model = place / path.name, graph.load(path)
        _round(model, rounded)
        graph.save(model, copy)
        yield copy


def _round(model: "onnx_ir.Model", rounded: set[str]) -> None:
    """Let every node compute in float32 and round these values, in place."""
    import onnx_ir

    narrow, wide = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    retype(model, narrow, wide)
    for node in list(model.graph):
        for output in node.outputs:
            if output.name in rounded:
                casts = [onnx_ir.node("Cast", [output], attributes={"to": int(narrow)})]
                casts.append(onnx_ir.node("Cast", [casts[0].outputs[0]], attributes={"to": int(wide)}))
                onnx_ir.convenience.replace_all_uses_with(output, casts[1].outputs[0])
                casts[0].replace_input_with(0, output)
                model.graph.insert_after(node, casts)


def _narrow_values(path: Path) -> set[str]:
    """Return the names of the values between nodes that are bfloat16."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    kind = onnx.TensorProto.BFLOAT16
    return {value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == kind}
