"""Graph: what is done to an ONNX graph between the exporter or the quantizer and the file.

Everything here leaves the graph's results, and the names of its inputs and outputs, as they are.
"""

import contextlib
import io
import itertools
import logging
import os
import string
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelathe.errors import ModelatheError
from modelathe.tensors import Array, Dim, TensorSpec
from optimize.graph import share
from optimize.model import globs
from optimize.model.errors import BadGraph, NoEffect, first_line

if TYPE_CHECKING:
    import onnx_ir

LARGEST_FILE = 2_000_000_000
"""Bytes of weights from which they go to a second file: a protobuf message cannot hold 2 GiB."""
QUANTIZED = {
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "MatMulInteger",
    "DynamicQuantizeLSTM",
    "MatMulNBits",
    "GatherBlockQuantized",
}
SMALLEST_TABLE = 4096
"""Values below which a constant that is looked up is no embedding table."""
FLOAT = "/float"
"""What the name of a node ends with that no quantizer takes: a step before put it there to stay float."""
PREFIX = "module."
"""What the exporter's wrapper puts before the names of the user's own parameters."""


def load(path: Path) -> "onnx_ir.Model":
    """Return the graph in `path`.

    Raises:
        BadGraph: the file is missing, cut off or not ONNX.
    """
    import onnx_ir

    try:
        return onnx_ir.load(path)
    except Exception as error:
        message = first_line(error) or type(error).__name__
        raise BadGraph(
            f"is not an ONNX file that can be read: {message}", where=str(path), fix="export it again"
        ) from error


def quantizable(path: Path) -> "onnx_ir.Model":
    """Return the graph in `path` as a quantizer needs it: every form of a shared weight written out.

    Raises:
        BadGraph: as `load`.
    """
    return share.own(load(path))


def save(model: "onnx_ir.Model", path: Path) -> Path:
    """Write the graph to `path`, its weights in `<name>.data` beside it only where one file cannot hold them."""
    import onnx_ir

    # Recorded shapes of inner values cost bytes, and go stale when a quantizer changes the graph: it then refuses it.
    boundary = {*model.graph.inputs, *model.graph.outputs}
    for value in _values(model.graph):
        value.metadata_props.clear()
        if value not in boundary:
            value.shape, value.type = None, None
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if weights >= LARGEST_FILE else None)
    return path


def clean(model: "onnx_ir.Model") -> None:
    """Fold constants, drop what no result depends on, and what the exporter wrote for debugging, in place."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    tidy = (
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(size_limit=10**9),
        passes.RemoveUnusedNodesPass(),
    )
    for tidying in tidy:
        tidying(model)
    # Limits lifted: an LSTM's weights reach it through Slice and Concat, and no quantizer looks through those.
    optimizer.fold_constants(model, input_size_limit=10**9, output_size_limit=10**9, should_fold=share.folds(model))
    for step in (*tidy, passes.RemoveUnusedOpsetsPass(), passes.ClearMetadataAndDocStringPass()):
        step(model)
    share.join(model)
    model.producer_name = model.producer_version = None


def name_nodes(graph: "onnx_ir.Graph") -> None:
    """Name every node after the module that it came from and its operator: `encoder.layer.0.dense/MatMul`."""
    for node in graph:
        node.name = f"{_traced_module(node)}/{node.op_type}".lstrip("/")
    number_names(graph)


def number_names(graph: "onnx_ir.Graph") -> None:
    """Number the nodes' names where several are the same."""
    taken: set[str] = set()
    for node in graph:
        if node.name:
            node.name = next(name for name in _numbered(node.name) if name not in taken)
            taken.add(node.name)


def module_of(node: "onnx_ir.Node") -> str:
    """Return the path of the module that stands in the node's name."""
    return (node.name or "").rpartition("/")[0]


def name_boundary(model: "onnx_ir.Model", inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs the user's names; an inner value that has one of them makes way."""
    import onnx_ir.passes.common as passes

    # A value that is returned twice, or is an input as well, gets a node of its own for each output.
    passes.OutputFixPass()(model)
    graph = model.graph
    boundary = [*graph.inputs, *graph.outputs]
    wanted = {*inputs, *outputs}
    taken = {value.name for value in _values(graph)} | wanted
    for value in _values(graph):
        if not any(value is other for other in boundary):
            name = (value.name or "v").removeprefix(PREFIX)
            if name in wanted or (name != value.name and name in taken):
                name = next(free for free in _numbered(name) if free not in taken)
            taken.add(name)
            value.name = name
    for value, name in zip(boundary, [*inputs, *outputs], strict=True):
        value.name = name


def shape_boundary(
    graph: "onnx_ir.Graph",
    inputs: Sequence[TensorSpec],
    outputs: Mapping[str, Sequence[int | str]],
) -> None:
    """Write the declared dims into the graph's inputs and the known ones into its outputs."""
    import onnx_ir

    for value, spec in zip(graph.inputs, inputs, strict=True):
        dims = [dim.name if isinstance(dim, Dim) and dim.minimum < dim.maximum else _size(dim) for dim in spec.dims]
        value.shape = onnx_ir.Shape(dims)
    for value in graph.outputs:
        value.shape = onnx_ir.Shape(outputs[str(value.name)])


def _size(dim: int | Dim) -> int:
    return dim.minimum if isinstance(dim, Dim) else dim


def move(source: Path, destination: Path) -> Path:
    """Rename an ONNX file; one with its weights in a second file is written anew, for it knows that file by name."""
    beside = source.with_name(f"{source.name}.data")
    if beside.exists():
        save(load(source), destination)
        source.unlink()
        beside.unlink()
        return destination
    return source.replace(destination)


def shorten_names(graph: "onnx_ir.Graph") -> None:
    """Give inner values one-letter names: in a small INT8 model names weigh as much as weights."""
    boundary = {value.name for value in (*graph.inputs, *graph.outputs)}
    names = (name for name in _short() if name not in boundary)
    for value in _values(graph):
        if value.name not in boundary:
            value.name = next(names)


def drop_node_names(path: Path) -> Path:
    """Take the names of the nodes out of the file, in place: they serve the steps that follow, and weigh as much."""
    model = load(path)
    for node in model.graph:
        node.name = None
    written = save(model, path.with_name(f".{path.name}"))
    return move(written, path)


def _traced_module(node: "onnx_ir.Node") -> str:
    """Return the path of the module that a node came from, as far as the exporter left a trace of it."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and (value.name or "").startswith(PREFIX):
            return str(value.name).removeprefix(PREFIX).rpartition(".")[0]
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    paths = [scope.strip(" '\"[]") for scope in scopes.split(",")][:-1]
    return paths[-1].removeprefix("module").removeprefix(".") if paths else ""


def _values(graph: "onnx_ir.Graph") -> Iterator["onnx_ir.Value"]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
    for node in graph:
        yield from (output for output in node.outputs if output.name)


def _numbered(base: str) -> Iterator[str]:
    yield base
    yield from (f"{base}_{number}" for number in itertools.count(2))


def _short() -> Iterator[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))


def constant(value: "onnx_ir.Value | None") -> Array:
    """Return the array behind a constant value."""
    if value is None or value.const_value is None:
        raise ValueError("the value is not a constant")
    return value.const_value.numpy()


def operators(model: "onnx_ir.Model") -> set[str]:
    """Return the types of the operators in the graph."""
    return {node.op_type for node in model.graph}


def activation_products(model: "onnx_ir.Model") -> list[str]:
    """Return the names of the products of two activations, as an attention's, and of those that no quantizer takes."""
    weighted = names_of(model, ("MatMul", "Gemm"))
    nodes = (node for node in model.graph if node.name and node.op_type in ("MatMul", "Gemm"))
    return [str(node.name) for node in nodes if node.name not in weighted]


def names_of(model: "onnx_ir.Model", kinds: Sequence[str]) -> list[str]:
    """Return the names of the nodes of these types with a constant float weight that a quantizer takes.

    That of a MatMul or Gemm has two axes; a Gather's is an embedding table.
    """
    found = []
    for node in model.graph:
        weight = node.inputs[0 if node.op_type == "Gather" else 1] if node.op_type in kinds else None
        array = weight.const_value if weight is not None and weight.is_initializer() else None
        if array is None or not array.dtype.is_floating_point() or (node.name or "").endswith(FLOAT):
            continue
        if node.op_type in ("MatMul", "Gemm", "Gather") and len(array.shape) != 2:
            continue
        looks_rows_up = node.attributes.get_int("axis", 0) == 0
        if node.op_type != "Gather" or (looks_rows_up and array.size >= SMALLEST_TABLE):
            found.append(str(node.name))
    return found


def excluded(model: "onnx_ir.Model", patterns: Sequence[str]) -> list[str]:
    """Return the names of the nodes that match one of the patterns, and of those that stay float anyway.

    Raises:
        NoEffect: a pattern matches no node.
    """
    names = [node.name for node in model.graph if node.name]
    kept = globs.excluded(names, patterns, "node")
    return [name for name in names if name in kept or name.endswith(FLOAT)]


def refuse_quantized(model: "onnx_ir.Model", path: Path, kinds: Sequence[str] = ()) -> None:
    """Refuse a graph that a quantizer has been at, unless it left a node of one of `kinds` with a float weight.

    Raises:
        BadGraph: naming the operator that shows it.
    """
    found = operators(model) & QUANTIZED
    if found and not names_of(model, kinds):
        raise BadGraph(
            f"is quantized already (it has {', '.join(sorted(found))})",
            where=path.name,
            fix="quantize the float export, or let the step before exclude what this one is for",
        )


def refuse_idle(model: "onnx_ir.Model", kinds: Sequence[str], kept: Sequence[str]) -> None:
    """Refuse to quantize where every weight is kept float: asked for nothing, a quantizer takes everything.

    Raises:
        NoEffect: listing what could have been quantized.
    """
    names = names_of(model, kinds)
    if not names:
        raise NoEffect(
            f"the model has no weight that this method takes, which are those of {', '.join(kinds)}",
            fix="leave it out, or use another: quantize.static takes convolutions too, quantize.half every weight",
        )
    if not set(names) - set(kept):
        raise NoEffect(
            "no weight is left to quantize: each is excluded, or faster in float",
            fix=f"exclude less, or leave the step out; it could match: {', '.join(names)}",
        )


def rewrite(
    path: Path, quantize: Callable[[str, str], object], mend: Callable[["onnx_ir.Model"], None] | None = None
) -> Path:
    """Put what `quantize(source, destination)` writes, mended and stripped, in the place of the file.

    Raises:
        BadGraph: the quantizer failed.
        Whatever the calibration data raises.
    """
    written = path.with_name(f".{path.name}")
    try:
        with quiet():
            quantize(str(path), str(written))
        model = load(written)
        if mend is not None:
            mend(model)
        clean(model)
        shorten_names(model.graph)
        save(model, written)
    except ModelatheError:
        raise
    except Exception as error:
        raise BadGraph(
            f"cannot be quantized: {type(error).__name__}: {first_line(error)}",
            where=path.name,
            fix="exclude the node that stands in the way, or use another method of the family quantize",
        ) from error
    return move(written, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress lines, warnings and logs of exporters and quantizers; their result is checked itself.

    What is not Python writes to the descriptors: torch prints whole graphs when it gives up.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            _closed(1),
            _closed(2),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _closed(number: int) -> Iterator[None]:
    """Let what is written to a descriptor of this process go nowhere."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(number)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), number)
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
