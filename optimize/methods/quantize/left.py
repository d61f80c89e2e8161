"""Left: the weights that a quantizer left in float. A file of which little was quantized is no success."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.graph import graph
from optimize.model import globs
from optimize.model.errors import NoEffect

if TYPE_CHECKING:
    import onnx_ir

    from optimize.step.contract import Method

SMALLEST = 64
"""Numbers below which a constant is no weight."""
MOST = 0.5
"""Share of the weights' bytes above which what cannot be quantized is most of the model."""
TOLD = 0.01
"""Share from which a layer is named."""
SCALES = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLSTM")
"""Operators whose float constants are scales."""


def floats(path: Path) -> dict[str, int]:
    """Return the bytes of float32 and float64 weights by the name of the node that reads them, in branches too."""
    found: dict[str, int] = {}
    for node, tensor in _weights(path):
        if node.op_type not in SCALES and str(tensor.dtype) in ("FLOAT", "DOUBLE"):
            # The quantizers make MatMul and Add of a Gemm.
            name = (node.name or node.op_type).removesuffix("_MatMul")
            found[name] = found.get(name, 0) + tensor.nbytes
    return found


def stored(path: Path) -> int:
    """Return the bytes that the weights stored in fewer bits would have in float32."""
    total = 0
    for node, tensor in _weights(path):
        bits = tensor.dtype.bitwidth
        if bits <= 8 or str(tensor.dtype) in ("FLOAT16", "BFLOAT16"):
            packed = 2 if node.op_type == "MatMulNBits" and node.attributes.get_int("bits", 8) == 4 else 1
            total += 4 * packed * tensor.size
    return total


def _weights(path: Path) -> "Iterator[tuple[onnx_ir.Node, onnx_ir.TensorProtocol]]":
    """Yield each constant of some size with the first node that reads it."""
    import onnx_ir

    seen = set[onnx_ir.Value]()
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph.load(path).graph):
        for value in node.inputs:
            tensor = value.const_value if value is not None else None
            if value is not None and tensor is not None and tensor.size >= SMALLEST and value not in seen:
                seen.add(value)
                yield node, tensor


def told(method: "Method", step: Any, subject: Any, result: Path, *, last: bool) -> str:
    """Return what stayed float with its share of the weights' bytes, in words; empty where that is next to nothing.

    Args:
        method: of the step.
        step: its config; what it excludes was asked for.
        subject: what it was applied to, an ONNX file or a module.
        result: the ONNX file that it made.
        last: whether no other step will quantize what it left.

    Raises:
        NoEffect: most is float that the method cannot quantize, this step is the last, and did not say `partial`.
    """
    after, before = floats(result), floats(subject) if isinstance(subject, Path) else None
    sizes = (
        after if before is None else {name: min(size, before[name]) for name, size in after.items() if name in before}
    )
    total = max(stored(result) + sum(sizes.values()), 1)
    shares = {name: size / total for name, size in sizes.items()}
    could = {*method.matches(subject)} if before is not None else set[str]()
    chosen = {*globs.matching(shares, getattr(step, "exclude", ()))}
    cannot = sum(share for name, share in shares.items() if name not in could | chosen)
    parts = ", ".join(f"{name} ({share:.0%})" for name, share in _largest(shares))
    words = f"{sum(shares.values()):.0%} of the weights' bytes: {parts}"
    if last and cannot > MOST and not _asked(step):
        raise NoEffect(
            f"{method.name} cannot quantize most of this model; float stays {words}",
            fix="use a method that takes these (quantize.half takes every weight outside of If and Loop), "
            "or set partial = true (--partial) to go on",
        )
    return f"{method.name}: float stays {words}" if parts else ""


def _largest(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(((name, share) for name, share in shares.items() if share >= TOLD), key=lambda each: -each[1])


def _asked(step: Any) -> bool:
    """Say whether the config itself wants a part of the weights float."""
    return bool(step.partial) or "float" in (getattr(step, "weights", ""), getattr(step, "tables", ""))
