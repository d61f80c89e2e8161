"""Compiler: whether TensorRT takes a graph, asked of NVIDIA's own parser and builder, on any machine.

The compiler is that of TensorRT for RTX, whose wheel needs no GPU to build. It shares its ONNX parser and its strongly
typed builder's rules with TensorRT. Its engines run on RTX GPUs in TensorRT-RTX, not in Triton's TensorRT backend; for
that, the engine is built on the machine that serves it (`plan.write`).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelathe.errors import MachineError, UsageError
from modelathe.tensors import TensorSpec
from optimize.graph import graph as graphs
from optimize.machine import extra
from optimize.model.errors import BadGraph
from optimize.tensorrt import rules
from optimize.tensorrt.rules import Finding
from serve.config import gpu
from serve.tensorrt import ask
from serve.tensorrt.capability import CAPABILITIES, USUAL, WITHOUT_FP8

if TYPE_CHECKING:
    import onnx_ir

LOG = ".compiler.log"
"""What the name of a log beside a folder ends with."""
PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM", "ATTENTION_INPUT")
"""Layers that the time goes to."""
CARRIERS = ("SHUFFLE", "IDENTITY")
"""Layers that may lie between a quantized value and where it is used."""
SHOWN = 8
"""Names of layers in one line."""
TYPES = {"FLOAT": "FP32", "HALF": "FP16"}
"""Types that are called otherwise in TensorRT's enum."""
ANOTHER_WAY = (
    "write it in other operators, or serve it by ONNX Runtime, which computes it itself and gives TensorRT the rest: "
    "--partial"
)
REASONS = (
    (r"^false$|No importer registered", "TensorRT has no {operator}", ANOTHER_WAY),
    (r"Plugin not found", "{operator} is no operator of ONNX, and TensorRT has no plugin of that name", ANOTHER_WAY),
    (r"profile has min=", "{text}", "export it again: its graph is not that of the workload's inputs"),
    (r"FP8|Float8", "{text}", "compile for compute capability 8.9 or newer, or quantize to INT8"),
)
"""What the parser or the builder says, in one plain line, and the way out; the first that fits."""


@dataclass(frozen=True)
class Compiled:
    """An engine, and what the compiler made of the graph.

    Args:
        capabilities: what it was compiled for.
        version: of the compiler.
        seconds: that it took to build.
        bytes: of the engine.
        layers: how many products, convolutions and attentions compute in each precision.
        float32: the names of those that compute in FP32.
        log: everything that the compiler said.
    """

    capabilities: tuple[str, ...]
    version: str
    seconds: float
    bytes: int
    layers: Mapping[str, int]
    float32: tuple[str, ...]
    log: Path

    def told(self) -> str:
        """Return it in one line."""
        layers = ", ".join(f"{count} in {precision}" for precision, count in sorted(self.layers.items()))
        return (
            f"TensorRT for RTX {self.version} compiled it for compute capability {', '.join(self.capabilities)}: "
            f"{self.bytes:,} bytes in {self.seconds:.1f} s; products and convolutions: {layers or 'none'}"
        )

    def wide(self) -> str:
        """Return what computes in FP32 beside others, and why it matters; empty where nothing does."""
        if not self.float32 or len(self.layers) < 2:
            return ""
        names = ", ".join(self.float32[:SHOWN]) + (", …" if len(self.float32) > SHOWN else "")
        return (
            f"in FP32, which reads twice the bytes of FP16 and multiplies at half its rate or less: {names}; "
            "quantize.half after it makes them FP16"
        )

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        lists = {"capabilities": list(self.capabilities), "float32": list(self.float32), "log": str(self.log)}
        return {**vars(self), **lists, "layers": dict(self.layers)}


def compile(
    graph: Path,
    inputs: Sequence[TensorSpec],
    engine: Path,
    log: Path,
    capabilities: Sequence[str] = USUAL,
    *,
    sparse: bool = False,
) -> Compiled:
    """Compile a graph in a process of its own, strongly typed, for the sizes that `inputs` declare.

    Args:
        graph: the ONNX file.
        inputs: of the graph; give the optimization profile.
        engine: the file to write.
        log: the file for everything that the compiler says.
        capabilities: of `CAPABILITIES`.
        sparse: let it use the kernels for 2:4 sparse weights.

    Raises:
        MissingExtra: the compiler is not installed.
        BadGraph: it refused the graph; `partial` holds a finding for each node.
        MachineError: it ended without an answer, or the disk is full.
        UsageError: there is no such compute capability.
    """
    extra.require("tensorrt")
    _check(capabilities, graph)
    found = ask.ask(
        log,
        graph=str(graph.absolute()),
        engine=str(engine.absolute()),
        profiles={name: list(sizes.values()) for name, sizes in gpu.profile(inputs).items()},
        capabilities=[CAPABILITIES[name] for name in capabilities],
        sparse=sparse,
        parts=False,
    )
    if found.get("disk"):
        raise MachineError(
            f"the engine could not be written: {found['disk']}", where=str(engine), fix="make room on the disk"
        )
    if found["errors"]:
        raise _refused(found["errors"], graph, log)
    by_precision = precisions(found["layers"])
    counted = Counter(by_precision.values())
    float32 = tuple(name for name, precision in by_precision.items() if precision == "FP32")
    return Compiled(tuple(capabilities), found["version"], found["seconds"], found["bytes"], counted, float32, log)


def taken(graph: Path, log: Path) -> tuple[int, int, int]:
    """Return how many nodes of a graph TensorRT's parser takes, how many there are, and in how many parts it does.

    Raises:
        MissingExtra: the compiler is not installed.
        MachineError: it ended without an answer.
    """
    extra.require("tensorrt")
    parts = ask.ask(log, graph=str(graph.absolute()), parts=True)["parts"]
    return sum(parts), len(graphs.load(graph).graph), len(parts)


def _check(capabilities: Sequence[str], graph: Path) -> None:
    for name in capabilities:
        if name not in CAPABILITIES:
            raise UsageError(f"compute capability {name} is not known", fix=f"use one of {', '.join(CAPABILITIES)}")
    if "current" in capabilities and len(capabilities) > 1:
        raise UsageError("the capability current stands alone", fix="name the others one by one, or current only")
    old = [name for name in capabilities if name in WITHOUT_FP8]
    if old and rules.precision(graph) == "FP8":
        raise BadGraph(
            f"has FP8, which GPUs of compute capability {', '.join(old)} cannot compute",
            where=str(graph),
            fix="compile for 8.9 or newer, or quantize to INT8 with quantize.static",
        )


def _refused(errors: Sequence[Mapping[str, Any]], graph: Path, log: Path) -> BadGraph:
    """Return the failure that names the first node that stands in the way, and holds all of them."""
    model = graphs.load(graph)
    findings = list(dict.fromkeys(_finding(error, model) for error in errors))
    first, more = findings[0], f" ({len(findings) - 1} more, see {log})" if len(findings) > 1 else ""
    failure = BadGraph(
        f"TensorRT's compiler refuses it: {first.node}: {first.what}{more}", where=str(graph), fix=first.fix
    )
    failure.partial = {"findings": rules.document(findings), "log": str(log)}
    return failure


def _finding(error: Mapping[str, Any], model: "onnx_ir.Model") -> Finding:
    """Return what the compiler said of a node, in one plain line under the name that the node has with us."""
    nodes, number = list(model.graph), error["node"]
    node = rules.name_of(nodes[number]) if 0 <= number < len(nodes) else "model"
    text = ask.plain(error["text"])
    for pattern, what, fix in REASONS:
        if re.search(pattern, text):
            words = {"operator": error["operator"], "text": text}
            rule = rules.OPERATORS if fix is ANOTHER_WAY else "compiler"
            return Finding("error", rule, node, what.format(**words), fix.format(**words))
    return Finding("error", "compiler", node, text, f"leave {node} float with exclude, or export the model without it")


def precisions(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return in which precision each layer computes that the time goes to.

    Args:
        layers: of the network, as `build` describes them. One computes in INT8 or FP8 if both of its sides come out of
            a DequantizeLinear; else in the type of its first input.
    """
    makers = {tensor[0]: layer for layer in layers for tensor in layer["outputs"]}

    def stored(tensor: Sequence[str]) -> str:
        maker = makers.get(tensor[0])
        while maker is not None and maker["kind"] in CARRIERS and maker["inputs"]:
            maker = makers.get(maker["inputs"][0][0])
        return maker["inputs"][0][1] if maker is not None and maker["kind"] == "DEQUANTIZE" else ""

    found = {}
    for layer in layers:
        if layer["kind"] in PRODUCTS:
            sides = [tensor for tensor in layer["inputs"][:2] if tensor is not None]
            types = {stored(tensor) for tensor in sides}
            kind = types.pop() if len(types) == 1 and len(sides) == 2 else ""
            found[layer["name"]] = kind or TYPES.get(sides[0][1], sides[0][1])
    return found
