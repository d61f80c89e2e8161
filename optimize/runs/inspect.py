"""Layers: what each module of a model costs, and which methods could change it.

Parameters and MACs are counted on the torch module. The share of the latency is measured: ONNX Runtime's profile of the
ONNX file, its nodes traced back to modules by their names. What ONNX Runtime runs as one operator, as a convolution and
the ReLU behind it, counts to the module of the operator that it is named after; what it no longer names after a module
stands under `other`.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from modelathe.tensors import Arrays, TensorSpec, generated
from optimize.graph import graph
from optimize.judge import macs, measure
from optimize.methods.export.onnx import export
from optimize.methods.table import METHODS
from optimize.model.errors import BadGraph, first_line
from optimize.predict.module import answering, call_with
from optimize.predict.onnxruntime import session_options
from optimize.source.workload import fewest
from optimize.step.bundle import Bundle
from serve.repository import scratch

if TYPE_CHECKING:
    import onnx_ir

OPENINGS, RUNS, WARM = 5, 6, 2
"""A profile is the median of so many sessions, for one session may be slow as long as it is open; and their calls."""
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits", "Gather", "LSTM", "GRU")
FOLLOWERS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Gelu", "BatchNormalization", "Cast", "Mul", "Add")
"""Operators that count to the layer before them, where they have no module and one input that is not constant."""
NAMED = {("MatMul", "Gemm"), ("MatMulInteger", "DynamicQuantizeMatMul")}
"""Operators that ONNX Runtime calls otherwise than the node that it makes them of."""
DEEPEST = 6
"""So many operators may lie between the one that a fused operator is named after and its last."""


@dataclass(frozen=True)
class Layer:
    """One module, or `other`.

    Args:
        name: its path in the model; empty for the model itself, for what its own forward does.
        kind: its class.
        parameters: its own, without those of modules in it; a tied weight counts for the first of its layers.
        share: of all parameters.
        macs: multiply-accumulate operations of its own for one sample of typical size.
        latency: share of the time in ONNX Runtime, None where no node could be traced to a module.
        output: shape of its first output, None where it has none.
        methods: what could change it.
        fused: modules that ONNX Runtime computes together with it, as far as its names tell; its time holds theirs.
    """

    name: str
    kind: str
    parameters: int
    share: float
    macs: int
    latency: float | None
    output: tuple[int, ...] | None
    methods: tuple[str, ...]
    fused: tuple[str, ...] = ()


class Ran(NamedTuple):
    """One of ONNX Runtime's own nodes in a profile: its name, its operator, and its place."""

    name: str
    operator: str
    place: str


@dataclass(frozen=True)
class Inspection:
    """A model's layers in the order of its modules, `other` last, and what to know about them."""

    layers: tuple[Layer, ...]
    parameters: int
    macs: int | None
    milliseconds: float
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def inspect(bundle: Bundle, batch: int = 1) -> Inspection:
    """Return what the layers of a bundle's model cost at this batch size, or the least that the workload declares.

    Raises:
        BadModel, BadGraph: the model cannot be run or exported.
    """
    module, inputs = bundle.module.eval(), bundle.workload.inputs
    batch = max(batch, fewest(inputs))
    known = macs.by_module(module, inputs)
    counted = known or {}
    shapes = output_shapes(module, inputs, batch)
    with scratch.folder() as folder:
        named = bundle.graph if bundle.graph and _is_export(bundle.graph) else None
        if named is None:
            named = export(module, inputs, bundle.workload.outputs, folder / "float.onnx")
        times, fused = latencies(bundle.graph or named, named, inputs, batch, folder)
        could = methods(module, named if bundle.graph in (None, named) else None)
    total = sum(times.values())
    every = max(measure.parameters(module), 1)
    own: dict[str, int] = defaultdict(int)
    for name, parameter in module.named_parameters():  # a tied weight once, for its first layer
        own[name.rpartition(".")[0]] += parameter.numel()
    rows = [
        Layer(
            name,
            type(layer).__name__,
            own.get(name, 0),
            own.get(name, 0) / every,
            counted.get(name, 0),
            times.get(name, 0.0) / total if set(times) - {None} else None,
            shapes.get(name),
            tuple(could.get(name, ())),
            tuple(sorted(fused.get(name, ()))),
        )
        for name, layer in module.named_modules()
    ]
    notes = (*warnings(module, shapes), *([macs.UNKNOWN] if known is None else []))
    other = Layer("other", "", 0, 0.0, 0, times.get(None, 0.0) / total, None, ())
    kept = [row for row in rows if row.parameters or row.macs or row.latency]
    return Inspection(
        (*kept, other), measure.parameters(module), None if known is None else sum(known.values()), total, notes
    )


def output_shapes(module: nn.Module, inputs: Sequence[TensorSpec], batch: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each called module's first output."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            from torch.utils._pytree import tree_leaves

            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            if tensors:
                shapes[name] = tuple(tensors[0].shape)

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in module.named_modules()]
    try:
        with answering():
            call_with(module, {name: torch.from_numpy(array) for name, array in generated(inputs, batch).items()})
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def methods(module: nn.Module, path: Path | None) -> dict[str, list[str]]:
    """Return which pruning and quantization methods could change each module, by module name.

    Args:
        module: the torch model.
        path: its float export; None where the model is quantized, which no further method of the graph takes.
    """
    found: dict[str, list[str]] = defaultdict(list)
    modules = dict(module.named_modules())
    for method in METHODS.values():
        if method.name.startswith(("distill.", "export.")):
            continue
        if method.stage == "graph" and path is None:
            continue
        for match in method.matches(path if method.stage == "graph" else module):
            place = match.rpartition("/")[0] if method.stage == "graph" else match
            if place not in modules:
                place = place.rpartition(".")[0]
            # A method that names a block could change all that is in it.
            for name in modules:
                if name and (name == place or name.startswith(f"{place}.")) and method.name not in found[name]:
                    found[name].append(method.name)
    return found


def latencies(
    path: Path, named: Path, inputs: Sequence[TensorSpec], batch: int, folder: Path
) -> tuple[dict[str | None, float], dict[str, set[str]]]:
    """Return the milliseconds that each module takes in one call, and by module what is computed together with it.

    None is the key of the time that belongs to no module.

    Args:
        path: the file that is timed.
        named: the float export, its nodes named after modules; the same file, or what `path` was quantized from.
        inputs: what is fed, at typical sizes.
        batch: how many samples.
        folder: an empty one.
    """
    model = graph.load(path)
    owners = _owners(model, _weights(graph.load(named)))
    for number, node in enumerate(owners):
        # Fused nodes keep the name of a node, or of a value.
        node.name = f"#{number}#{node.op_type}"
        for index, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"#{number}#{index}"
    place = folder / "profiled.onnx"
    graph.save(model, place)
    return _by_module(_profile(place, inputs, batch, folder), owners)


def _by_module(
    profile: Mapping[Ran, float], owners: "Mapping[onnx_ir.Node, str | None]"
) -> tuple[dict[str | None, float], dict[str, set[str]]]:
    """Return what a profile says of each module; see `latencies`."""
    nodes, taken = list(owners), set[Any]()
    times: dict[str | None, float] = defaultdict(float)
    fused: dict[str, set[str]] = defaultdict(set)
    # In the order of the graph, so that of two branches the first is not taken for the second.
    for ran, milliseconds in sorted(profile.items(), key=lambda item: _number(item[0].name, len(nodes))):
        number = _number(ran.name, len(nodes))
        if number == len(nodes):
            times[None] += milliseconds
            continue
        first, *rest = _together(nodes[number], ran.operator, taken)
        taken.add(first)
        owner = owners[first]
        times[owner] += milliseconds
        if owner is not None:
            fused[owner] |= {other for node in rest if (other := owners[node]) and other != owner}
    return dict(times), fused


def _number(name: str, unknown: int) -> int:
    """Return the number of the node that ONNX Runtime named an operator of its own after; else `unknown`."""
    parts = name.split("#")
    return int(parts[1]) if len(parts) > 2 and parts[1].isdigit() else unknown


def _together(node: "onnx_ir.Node", operator: str, taken: set[Any]) -> "list[onnx_ir.Node]":
    """Return the nodes that ONNX Runtime runs as one: first the one that the operator is called after.

    A fused operator is named after its last node or that node's output, a `Conv` after the ReLU behind it. So from
    there the nearest node before it is sought that the operator is called after and that no other one stands for.
    """
    paths = [[node]]
    for _ in range(DEEPEST):
        for path in paths:
            if _called_after(operator, path[0]) and path[0] not in taken:
                return path
        before = [(path, value.producer()) for path in paths for value in path[0].inputs if value is not None]
        paths = [
            [producer, *path]
            for path, producer in before
            if producer is not None and (producer.op_type not in WEIGHTED or _called_after(operator, producer))
        ]
    return [node]


def _called_after(operator: str, node: "onnx_ir.Node") -> bool:
    """Return whether an operator, such as `QLinearConv`, is one that ONNX Runtime makes of a node and others."""
    # A MatMul is no Mul.
    return (node.op_type, operator) in NAMED or re.search(f"(?<!Mat){node.op_type}", operator) is not None


def _profile(path: Path, inputs: Sequence[TensorSpec], batch: int, folder: Path) -> dict[Ran, float]:
    """Return the median milliseconds of each of ONNX Runtime's own nodes, which differ from those of the file."""
    arrays = generated(inputs, batch)
    found: dict[Ran, list[float]] = defaultdict(list)
    for _ in range(OPENINGS):
        for ran, milliseconds in _profile_once(path, arrays, folder).items():
            found[ran].append(milliseconds)
    return {ran: float(np.median(sessions)) for ran, sessions in found.items()}


def _profile_once(path: Path, arrays: Arrays, folder: Path) -> dict[Ran, float]:
    import onnxruntime

    options = session_options(path)
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(WARM + RUNS):
            session.run(None, arrays)
    except Exception as error:
        raise BadGraph(
            f"ONNX Runtime cannot run it: {first_line(error)}", where=path.name, fix="export it again"
        ) from error
    taken: dict[Ran, list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name, told = event["name"].removesuffix("_kernel_time"), event["args"]
            taken[Ran(name, str(told.get("op_name")), str(told.get("node_index")))].append(event["dur"] / 1000)
    return {ran: float(np.median(rounds[WARM:] or rounds)) for ran, rounds in taken.items()}


def _is_export(path: Path) -> bool:
    """Return whether the file is a float export, whose nodes are named after modules."""
    model = graph.load(path)
    return not graph.operators(model) & graph.QUANTIZED and any("/" in (node.name or "") for node in model.graph)


def _weights(model: "onnx_ir.Model") -> "list[tuple[onnx_ir.Node, int]]":
    """Return the nodes with a constant weight in order, and how many numbers it has."""
    found = []
    for node in (node for node in model.graph if node.op_type in WEIGHTED):
        value = node.inputs[0 if node.op_type == "Gather" else 1]
        while value is not None and value.producer() is not None and not value.is_initializer():
            producer = value.producer()
            stored = producer is not None and producer.op_type in ("DequantizeLinear", "Transpose")
            value = producer.inputs[0] if producer is not None and stored else None
        if value is not None and value.const_value is not None:
            found.append((node, int(value.const_value.size)))
    return found


def _owners(model: "onnx_ir.Model", known: "list[tuple[onnx_ir.Node, int]]") -> "dict[onnx_ir.Node, str | None]":
    """Return the module of each node: by its name, or where it lost that by its place in the order of the weights."""
    own = _weights(model)
    by_order: Mapping[Any, str | None] = {}
    if [size for _, size in own] == [size for _, size in known]:
        by_order = {node: _module(other) for (node, _), (other, _) in zip(own, known, strict=True)}
    owners: dict[Any, str | None] = {}
    for node in model.graph:
        owner = _module(node) or by_order.get(node)
        if owner is None and node.op_type in FOLLOWERS:
            moving = [value for value in node.inputs if value is not None and not value.is_initializer()]
            producer = moving[0].producer() if len(moving) == 1 else None
            owner = owners.get(producer)
        owners[node] = owner
    return owners


def _module(node: "onnx_ir.Node") -> str | None:
    return (node.name or "").rpartition("/")[0] or None


def warnings(module: nn.Module, called: Mapping[str, object]) -> tuple[str, ...]:
    """Return what a method may stumble over: shared weights and modules, frozen and unused ones, mixed dtypes."""
    found = []
    parameters = dict(module.named_parameters(remove_duplicate=False))
    modules = dict(module.named_modules(remove_duplicate=False))
    shared = _alike(modules)
    for names in shared:
        found.append(f"one module under several names: {', '.join(names)}")
    inside = tuple(f"{name}." for names in shared for name in names[1:])
    for names in _alike({name: value for name, value in parameters.items() if not name.startswith(inside)}):
        found.append(f"tied weights: {', '.join(names)}")
    frozen = [name for name, value in parameters.items() if not value.requires_grad]
    if frozen:
        found.append(f"{len(frozen)} frozen parameters, which no training changes: {_some(frozen)}")
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in parameters.values()})
    if len(kinds) > 1:
        found.append(f"parameters of several dtypes: {', '.join(kinds)}")
    idle = [
        name
        for name, layer in module.named_modules()
        if name not in called and not list(layer.children()) and list(layer.parameters())
    ]
    if idle:
        found.append(f"never called by name, so without an output shape: {_some(idle)}")
    return tuple(found)


def _alike(things: Mapping[str, object]) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name, thing in things.items():
        groups[id(thing)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
