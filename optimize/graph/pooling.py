"""Pooling: a ReLU and a max-pooling can change places without changing the result; which order is faster depends."""

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def relu_first(model: "onnx_ir.Model") -> None:
    """Turn Conv → MaxPool → Relu into Conv → Relu → MaxPool: the runtimes make one operator of a Conv and its Relu."""
    for node in [node for node in model.graph if node.op_type == "Conv"]:
        pool = _only_user(node, "MaxPool")
        relu = _only_user(pool, "Relu") if pool is not None else None
        if pool is not None and relu is not None:
            _swap(pool, relu)
    model.graph.sort()


def pool_first(model: "onnx_ir.Model", floats: Collection[str]) -> list[str]:
    """Turn Conv → Relu → MaxPool into Conv → MaxPool → Relu where a float Conv's result is quantized after it.

    ONNX Runtime moves the quantization of a MaxPool's output to its input, which makes the pooling of a float
    convolution's result INT8 in a slow layout; it does not move it over a Relu.

    Args:
        model: the graph, changed in place.
        floats: names of the convolutions that stay float.

    Returns:
        The names of the Relu and the MaxPool behind each of those, moved or not, which are to stay float too.
    """
    found = []
    for node in [node for node in model.graph if node.op_type == "Conv" and node.name in floats]:
        relu = _only_user(node, "Relu")
        pool = _only_user(relu, "MaxPool") if relu is not None else None
        if relu is None or pool is None:
            continue
        if any(user.node.name not in floats for user in pool.outputs[0].uses()):
            _swap(relu, pool)
        found += [str(relu.name), str(pool.name)]
    model.graph.sort()
    return found


def _swap(first: "onnx_ir.Node", second: "onnx_ir.Node") -> None:
    """Let `second`, the only user of `first`, come before it."""
    users = list(second.outputs[0].uses())
    second.replace_input_with(0, first.inputs[0])
    first.replace_input_with(0, second.outputs[0])
    for user, index in users:
        user.replace_input_with(index, first.outputs[0])


def _only_user(node: "onnx_ir.Node", kind: str) -> "onnx_ir.Node | None":
    """Return the node of this type that alone reads what `node` returns, itself read by others."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    user = uses[0].node
    return None if user.op_type != kind or user.outputs[0].is_graph_output() else user
