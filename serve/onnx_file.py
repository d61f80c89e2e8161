"""ONNX files, read without a runtime: what goes in and out, and which files belong to one.

The package onnx is imported inside the functions: only publishing and checking need it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from serve.errors import BadRepository

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import GraphProto, ModelProto, StringStringEntryProto, TensorProto, ValueInfoProto

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


def copy(onnx: Path, destination: Path) -> None:
    """Copy an ONNX file, and its external data beside it as `NAME.data`, `NAME.data.1` and so on.

    The names that the file states do not get into the version's folder: Triton would load a file there that is called
    like a shared library of a backend. The copy states the new names, and is the same file where nothing changes.

    Args:
        onnx: the file.
        destination: where the copy goes; the folder must exist.

    Raises:
        BadRepository: there is no such file, or its data are not files in its own folder.
    """
    if not onnx.is_file():
        raise BadRepository("there is no such model file", where=str(onnx), fix="export the model first")
    given = external(onnx)
    ours = {name: f"{destination.name}.data{f'.{number}' if number else ''}" for number, name in enumerate(given)}
    if all(name == new for name, new in ours.items()):
        shutil.copyfile(onnx, destination)
    else:
        destination.write_bytes(_renamed(onnx, ours))
    for name, new in ours.items():
        shutil.copyfile(onnx.parent / name, destination.with_name(new))


def external(onnx: Path) -> list[str]:
    """Return the names of the files that hold tensors outside of an ONNX file, those of inner graphs and functions too.

    Empty if it is no ONNX file at all.

    Raises:
        BadRepository: one is not a file in the model's own folder, or is reached by a link.
    """
    try:
        names = {location.value: None for location in _locations(_model(onnx))}
    except BadRepository:
        return []
    for name in names:
        path, folder = onnx.parent / name, Path(os.path.realpath(onnx.parent))
        if Path(name).is_absolute() or not path.is_file() or Path(os.path.realpath(path)) != folder / name:
            raise BadRepository(
                f"its external data {name!r} is not a file beside it", where=str(onnx), fix="export it again"
            )
    return list(names)


def _renamed(onnx: Path, names: "Mapping[str, str]") -> bytes:
    model = _model(onnx)
    for location in _locations(model):
        location.value = names[location.value]
    return bytes(model.SerializeToString())


def _locations(model: "ModelProto") -> "Iterator[StringStringEntryProto]":
    """Yield every entry of the file that names a file with external data."""
    from onnx import TensorProto

    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield from (entry for entry in tensor.external_data if entry.key == "location")


def _tensors(message: "Message") -> "Iterator[TensorProto]":
    """Yield every tensor of an ONNX message, wherever it stands: weights, attributes, inner graphs, functions."""
    from google.protobuf.message import Message
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                yield from _tensors(part)


def _graph(path: Path) -> "GraphProto":
    return _model(path).graph


def _model(path: Path) -> "ModelProto":
    from google.protobuf.message import DecodeError
    from onnx import load

    try:
        return load(path, load_external_data=False)
    except DecodeError:
        raise BadRepository("is not an ONNX file", where=str(path), fix="export the model again") from None
