"""Explain: the likely cause of a broken promise, from a run's measured stages and the operators of their graphs."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optimize.graph import graph
from optimize.judge import measure
from optimize.judge.ruler import Ratio

TINY_FILE = 64 * 1024
"""Bytes below which an ONNX file is mostly the description of its graph, not weights."""
TINY_CALL = 0.05
"""Milliseconds below which a call is mostly the runtime's own overhead."""

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "MatMulNBits", "LSTM", "DynamicQuantizeLSTM")
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast")


@dataclass(frozen=True)
class Stage:
    """The trained model, or what one step made of it.

    Args:
        name: the step's name, `trained` for the first.
        file: its ONNX file.
        latency_ms: milliseconds for one call, by batch size.
        change: how many times faster than the stage before, from the same rounds, by batch size.
    """

    name: str
    file: Path
    latency_ms: Mapping[int, float]
    change: Mapping[int, Ratio] = field(default_factory=dict)


def slower(stages: Sequence[Stage], batch: int, device: str = "cpu") -> str:
    """Return why the last stage is slower than the first at `batch`, and the way out.

    Only a stage whose whole interval says that it slowed down what it got is named. Not to be asked where the
    control of the same rounds is senseless.
    """
    slowed = [stage for stage in stages[1:] if stage.change[batch].verdict() == "slower"]
    if not slowed:
        return "no single step is shown to have slowed it down: each is within the noise; remove more, or leave it FP32"
    culprit = min(slowed, key=lambda stage: stage.change[batch].value)
    return f"{_slowed(culprit, batch)}: {_why_slower(culprit, stages[0], batch, device)}"


def warnings(stages: Sequence[Stage], control: Mapping[int, Ratio]) -> list[str]:
    """Return a sentence for each step that made what it got slower, whatever the steps before it had gained.

    Args:
        stages: as they were timed together.
        control: the trained model against itself in the same rounds; no step is blamed where that makes no sense.
    """
    return [
        f"{_slowed(stage, batch)}, against the step before; it may be better left out"
        for stage in stages[1:]
        for batch, ratio in stage.change.items()
        if ratio.verdict() == "slower" and not control[batch].senseless
    ]


def _slowed(stage: Stage, batch: int) -> str:
    return f"{stage.name} made it slower at batch {batch}: {stage.change[batch]}"


def larger(stages: Sequence[Stage]) -> str:
    """Return why the last stage's file is no smaller than the first one's, and the way out."""
    sizes = [float(measure.file_bytes(stage.file)) for stage in stages]
    rises = [after / before for before, after in itertools.pairwise(sizes)]
    worst = rises.index(max(rises))
    before, culprit = stages[worst], stages[worst + 1]
    grown = f"{measure.file_bytes(before.file):,} → {measure.file_bytes(culprit.file):,} bytes"
    if sizes[0] < TINY_FILE:
        why = "so small a file is mostly the description of its graph, which a step may lengthen; leave it as it is"
    else:
        why = "it added more to the file than it saved; leave it out, or let it change more layers"
    return f"{culprit.name} made it larger ({grown}): {why}"


def _why_slower(culprit: Stage, trained: Stage, batch: int, device: str) -> str:
    if trained.latency_ms[batch] < TINY_CALL:
        overhead = f"the trained model's call takes {trained.latency_ms[batch] * 1000:.0f} µs, mostly the runtime's own"
        return f"{overhead} overhead, which no compression shortens; raise the batch or leave it FP32"
    kinds = Counter(node.op_type for node in graph.load(culprit.file).graph)
    products = sum(kinds[kind] for kind in PRODUCTS)
    conversions = sum(kinds[kind] for kind in CONVERSIONS)
    ratio = f"{conversions} conversions for {products} products"
    if device == "cuda" and kinds["QuantizeLinear"]:
        return f"ONNX Runtime on a GPU gains nothing from INT8 ({ratio}); use quantize.half, or TensorRT as runtime"
    if device == "cuda" and culprit.name == "quantize.half":
        return "calls so short gain nothing from float16; raise the batch or leave it FP32"
    if culprit.name == "quantize.half":
        return "the CPU computes in float32 and converts at every operator; half precision pays on a GPU"
    if kinds["MatMulNBits"] and culprit.name.startswith("quantize."):
        return "packed weights are unpacked at every call; they save memory, not time, at this batch size"
    if kinds["DynamicQuantizeLinear"]:
        return f"quantize/dequantize outweighs the products ({ratio}); raise the batch or leave it FP32"
    if kinds["QuantizeLinear"] and kinds["Conv"]:
        return f"INT8 convolutions of few channels lose to FP32 ones ({ratio}); exclude them, or keep more channels"
    if conversions:
        return f"quantize/dequantize outweighs the products ({ratio}); exclude the smallest layers or leave it FP32"
    return "what is left runs no faster on this machine; remove more, or round channels to multiples of 16"
