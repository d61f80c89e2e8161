"""ONNX files, read without a runtime: what goes in and out, and which files belong to one.

The package onnx is imported inside the functions: only publishing and checking need it.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import BadRepository

if TYPE_CHECKING:
    from onnx import GraphProto, ValueInfoProto

KINDS = {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
"""ONNX's names of types where Triton has others."""
KEEPING = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear")
"""Operators that leave values as they are, as far as their type can hold them."""


def boundary(path: Path) -> tuple[dict[str, tuple[str, list[int] | None]], dict[str, tuple[str, list[int] | None]]]:
    """Return the inputs and the outputs of an ONNX file: Triton's data type, and dims with -1 for what may change.

    The dims of a tensor that the file says nothing of are None.

    Raises:
        BadRepository: it is not an ONNX file.
    """
    from onnx import TensorProto

    def described(value: "ValueInfoProto") -> tuple[str, list[int] | None]:
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type)
        dims = [size(value, axis) or -1 for axis in range(len(tensor.shape.dim))]
        return f"TYPE_{KINDS.get(kind, kind)}", dims if tensor.HasField("shape") else None

    inputs, outputs = values(path)
    return {value.name: described(value) for value in inputs}, {value.name: described(value) for value in outputs}


def values(path: Path) -> "tuple[list[ValueInfoProto], list[ValueInfoProto]]":
    """Return the inputs of an ONNX file without the weights, and the outputs.

    Raises:
        BadRepository: it is not an ONNX file, or has none.
    """
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if not inputs or not graph.output:
        raise BadRepository("has no inputs or no outputs", where=str(path), fix="export the model again")
    return inputs, list(graph.output)


def maker(path: Path, output: str) -> str:
    """Return the operator that an output of an ONNX file comes from, as in `Softmax`, empty if none makes it.

    Passed over is what leaves the values as they are, but for their shape and type.

    Raises:
        BadRepository: it is not an ONNX file.
    """
    nodes = {name: node for node in _graph(path).node for name in node.output}
    while output in nodes and nodes[output].op_type in KEEPING:
        output = nodes[output].input[0]
    return str(nodes[output].op_type) if output in nodes else ""


def size(value: "ValueInfoProto", axis: int) -> int:
    """Return the size of a dim, 0 if it changes."""
    return max(0, int(value.type.tensor_type.shape.dim[axis].dim_value))


def _graph(path: Path) -> "GraphProto":
    from google.protobuf.message import DecodeError
    from onnx import load

    try:
        return load(path, load_external_data=False).graph
    except DecodeError:
        raise BadRepository("is not an ONNX file", where=str(path), fix="export the model again") from None


def copy(onnx: Path, destination: Path) -> None:
    """Copy an ONNX file, and beside it the files with external data that it names.

    Raises:
        BadRepository: there is no such file, or its data are not files beside it.
    """
    folder = destination.parent
    if not onnx.is_file():
        raise BadRepository("there is no such model file", where=str(onnx), fix="export the model first")
    shutil.copyfile(onnx, destination)
    for name in external(onnx):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(onnx.parent / name, target)


def external(onnx: Path) -> list[str]:
    """Return the names of the files that hold the model's tensors outside of it.

    Raises:
        BadRepository: one is not there, or not in the model's own folder.
    """
    names = _external_files(onnx)
    for name in names:
        path = onnx.parent / name
        if not path.resolve().is_relative_to(onnx.parent.resolve()) or not path.is_file():
            raise BadRepository(
                f"its external data {name!r} is not a file beside it", where=str(onnx), fix="export it again"
            )
    return names


def _external_files(onnx: Path) -> list[str]:
    """Return the names of the files that hold the model's tensors outside of it; none if it is no ONNX file at all."""
    # Imported here because only publishing needs it; `serve up` works without the package onnx.
    from google.protobuf.message import DecodeError
    from onnx import load
    from onnx.external_data_helper import uses_external_data

    try:
        model = load(onnx, load_external_data=False)
    except DecodeError:
        return []
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    return sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})
