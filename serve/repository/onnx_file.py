"""ONNX files, read without a runtime: what goes in and out, and which files belong to one.

The package onnx is imported inside the functions: only publishing and checking need it.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from serve.config.errors import BadRepository

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import GraphProto, ModelProto, StringStringEntryProto, TensorProto, ValueInfoProto

KINDS = {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16", "BFLOAT16": "BF16"}
"""ONNX's names of types where Triton has others."""
KEEPING = ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear")
"""Operators that leave values as they are, as far as their type can hold them."""


def boundary(path: Path) -> tuple[dict[str, tuple[str, list[int] | None]], dict[str, tuple[str, list[int] | None]]]:
    """Return the inputs and the outputs of an ONNX file: Triton's data type, and dims with -1 for what may change.

    Inputs that have a default in the graph are there too: a request may give them. The dims of a tensor that the file
    says nothing of are None.

    Raises:
        BadRepository: it is not an ONNX file.
    """
    from onnx import TensorProto

    def described(value: "ValueInfoProto") -> tuple[str, list[int] | None]:
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type)
        dims = [size(value, axis) or -1 for axis in range(len(tensor.shape.dim))]
        return other_kind(value) or f"TYPE_{KINDS.get(kind, kind)}", dims if tensor.HasField("shape") else None

    graph = _graph(path)
    inputs, outputs = ({value.name: described(value) for value in values} for values in (graph.input, graph.output))
    return inputs, outputs


def values(path: Path) -> "tuple[list[ValueInfoProto], list[ValueInfoProto]]":
    """Return the inputs of an ONNX file without the weights, and the outputs; each is a tensor of a known rank.

    What the file does not say of an output's dims is derived from its nodes.

    Raises:
        BadRepository: it is not an ONNX file, has none, or one is no tensor or of any rank.
    """
    graph = _graph(path)
    weights = {tensor.name for tensor in graph.initializer}
    inputs, outputs = [value for value in graph.input if value.name not in weights], list(graph.output)
    if not inputs or not outputs:
        raise BadRepository("has no inputs or no outputs", where=str(path), fix="export the model again")
    if any(not other_kind(value) and not _is_stated(value) for value in outputs):
        outputs = _derived(path)
    for value in (*inputs, *outputs):
        _check_tensor(value, path)
    return inputs, outputs


def required(path: Path) -> frozenset[str]:
    """Return the names of the inputs for which an ONNX file has no value of its own.

    Raises:
        BadRepository: it is not an ONNX file.
    """
    graph = _graph(path)
    return frozenset(value.name for value in graph.input) - {tensor.name for tensor in graph.initializer}


def other_kind(value: "ValueInfoProto") -> str:
    """Return what an input or output is that is no dense tensor, as in `a sequence of maps`; empty for a tensor."""
    kind = value.type.WhichOneof("value")
    if kind in ("tensor_type", None):
        return ""
    if kind == "sequence_type" and value.type.sequence_type.elem_type.HasField("map_type"):
        return "a sequence of maps"
    return f"a {kind.removesuffix('_type').replace('_', ' ')}"


def _is_stated(value: "ValueInfoProto") -> bool:
    """Whether the file says of which type a tensor is, and how many dims it has."""
    return value.type.tensor_type.HasField("shape") and value.type.tensor_type.elem_type > 0


def _derived(path: Path) -> "list[ValueInfoProto]":
    """Return the outputs with what the shapes of the inputs and the operators say of theirs."""
    from onnx import shape_inference

    try:
        return list(shape_inference.infer_shapes(_model(path)).graph.output)
    except Exception:  # an operator that it does not know: what the file says is all there is
        return list(_graph(path).output)


def _check_tensor(value: "ValueInfoProto", path: Path) -> None:
    if kind := other_kind(value):
        way = "with options={'zipmap': False}, as skl2onnx has it" if "maps" in kind else "with tensors in its place"
        raise BadRepository(
            f"{value.name} is {kind}, and Triton carries tensors only", where=str(path), fix=f"export the model {way}"
        )
    if not _is_stated(value):
        raise BadRepository(
            f"nothing says of which type {value.name} is, or how many dims it has",
            where=str(path),
            fix=f"state its shape in the file, as with onnx.helper.make_tensor_value_info({value.name!r}, ...)",
        )


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


def in_integers(path: Path) -> bool:
    """Whether an ONNX file computes in integers whose ranges it may take from what it is given.

    Raises:
        BadRepository: it is not an ONNX file.
    """
    return any("Quantize" in node.op_type or "Integer" in node.op_type for node in _graph(path).node)


def in_float16(path: Path) -> bool:
    """Whether an ONNX file computes in float16, and does not only store weights in it.

    In such a file a Transpose before a product is enough to end the process: the optimizer of ONNX Runtime that lays
    tensors out anew for a CPU (NchwcTransformer) dies of it (seen in 1.31.1; microsoft/onnxruntime issue 28392).

    Raises:
        BadRepository: it is not an ONNX file.
    """
    from onnx import TensorProto

    graph, half = _graph(path), TensorProto.FLOAT16
    nodes, narrow = [], set[str]()
    waiting = [graph]
    while waiting:
        part = waiting.pop()
        nodes += part.node
        narrow |= {tensor.name for tensor in part.initializer if tensor.data_type == half}
        attributes = (attribute for node in part.node for attribute in node.attribute)
        waiting += [inner for attribute in attributes for inner in (attribute.g, *attribute.graphs) if inner.node]
    casts = (node for node in nodes if node.op_type == "Cast")
    return (
        any(value.type.tensor_type.elem_type == half for value in graph.input)
        or any(attribute.i == half for node in casts for attribute in node.attribute if attribute.name == "to")
        or any(narrow & set(node.input) for node in nodes if node.op_type != "Cast")
    )


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

    A link is followed as far as the model's own folder, or the folder that holds the file which the model's own name
    is a link to, as in a cache of models.

    Raises:
        BadRepository: one is no file there.
    """
    try:
        names = {location.value: None for location in _locations(_model(onnx))}
    except BadRepository:
        return []
    folders = [Path(os.path.realpath(onnx.parent)), Path(os.path.realpath(onnx)).parent]
    for name in names:
        path = onnx.parent / name
        there = Path(os.path.realpath(path))
        if Path(name).is_absolute() or not path.is_file() or not any(map(there.is_relative_to, folders)):
            raise BadRepository(
                f"its external data {name!r} is not a file beside it",
                where=str(onnx),
                fix="put the file there, or export the model again",
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
