"""Judging: the result of a run, timed and judged by its gates before it is served, and what stops it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelathe.tensors import TensorSpec
from optimize.judge import explain, gate, macs, measure, speed
from optimize.judge.evaluate import Quality, compare
from optimize.judge.gate import Gate
from optimize.judge.measure import Cost
from optimize.judge.speed import TRAINED, Timing
from optimize.methods.table import METHODS
from optimize.model.errors import BadGraph, BusyMachine, GateRefused
from optimize.runs.advance import folders
from optimize.runs.baseline import graph_of
from optimize.runs.recipe import DEFAULTS, Recipe
from optimize.runs.run import Run
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from serve.config.target import TENSORRT, Target
from serve.repository import scratch


def timed(this: Run, elements: list[dict[str, Any]], worth: bool) -> Timing:
    """Time every step's ONNX file with the trained one's, and add times and ratios to the elements.

    Only a promise whose answer is `worth` something, since nothing else refused the result, is measured with patience.
    """
    if not speed.lacking(this.recipe.target):
        this.progress("measuring speed", 0.0)
    names, trained = folders(this.recipe), this.trained.bundle
    files = {TRAINED: graph_of(trained), **{name: this.folder / name / bundles.GRAPH for name in names}}
    labels = [TRAINED, *(element["name"] for element in elements)]
    promised = any("faster" in METHODS[type(step)].promises for step in this.recipe.steps)
    patience = speed.HASTE if this.turn.following else speed.PATIENCE
    if this.terms.patience is not None:
        patience = this.terms.patience
    wait = patience if promised and worth else 0.0
    timing = speed.time(files, labels, trained.workload.inputs, this.recipe.target, wait)
    for name, element in zip(names, elements, strict=True):
        times = {"latency_ms": timing.speeds.latency_ms(name), "throughput": timing.speeds.throughput(name)}
        by_batch = {key: {str(batch): value for batch, value in found.items()} for key, found in times.items()}
        element["cost"] = {**element["cost"], **by_batch}
        element["ratios"] = timing.ratios(name)
    return timing


def quality(this: Run, last: Bundle, found: Quality) -> Gate:
    """Judge what was lost of the first score."""
    recipe, first, result = this.recipe, this.trained.quality.scores[0], found.scores[0]
    difference = compare(last.workload, result, first)
    return gate.quality(recipe.budget, first, result, difference, this.terms.strict, recipe.names)


def promised(this: Run, last: Bundle, timing: Timing) -> list[Gate]:
    """Judge the size, and what the steps promise."""
    recipe = this.recipe
    gates = gate.size(recipe.budget, measure.file_bytes(graph_of(last)))
    stages = timing.stages()
    promises = set().union(*(METHODS[type(step)].promises for step in recipe.steps))
    if "smaller" in promises:
        gates.append(gate.smaller(timing.ratios(timing.result)["size"], stages))
    if "faster" in promises:
        batches, device = () if timing.unmeasured else recipe.target.batch, recipe.target.device
        gates += [gate.faster(batch, timing.result, timing.speeds, stages, device) for batch in batches]
    return gates


def why(refused: Gate) -> str:
    """Return why a gate said no, in short; what was not decided is not called worse."""
    open_ = "undecided: the machine is too busy, " if refused.machine else "undecided, " if refused.undecided else ""
    return f"{refused.name}: {open_}{refused.measured}"


def instead(recipe: Recipe, refused: Sequence[Gate]) -> str:
    """Return the preset that may pass where quantized computation lost speed on a CPU; empty elsewhere."""
    method = METHODS[type(recipe.steps[-1])]
    quantized = method.name.startswith("quantize.") and "faster" in method.promises
    slower = any(entry.name.startswith("promise: faster") for entry in refused)
    helps = quantized and slower and recipe.target.device == "cpu"
    return f"--preset {DEFAULTS[-1]}, which promises no speed" if helps else ""


def compiled(target: Target, graph: Path, inputs: Sequence[TensorSpec], log: Path) -> list[Gate]:
    """Judge, for a runtime that compiles the graph, whether NVIDIA's compiler takes it."""
    if target.runtime not in TENSORRT:
        return []
    from optimize.tensorrt import compiler, rules

    limit = "TensorRT's compiler takes it"
    with scratch.folder() as place:
        try:
            findings = rules.check(graph)
            rules.refuse(findings, graph)
            found = compiler.compile(graph, inputs, place / "model.engine", log)
        except BadGraph as failure:
            return [Gate("compiles", False, failure.what, limit, failure.fix)]
    advice = "; ".join(filter(None, (found.wide(), *rules.told(findings))))
    return [Gate("compiles", True, found.told(), limit, advice)]


def warnings(timing: Timing, stages: list[explain.Stage], counted: Cost) -> list[str]:
    """Return what is doubtful of the figures: steps that cost speed, no speed at all, MACs that are not known."""
    found = explain.warnings(stages, timing.speeds.control())
    unmeasured = [f"speed is {timing.unmeasured}"] if timing.unmeasured else []
    return [*found, *unmeasured, *([macs.UNKNOWN] if counted.macs is None else [])]


def stop(gates: list[Gate], folder: Path, result: dict[str, Any], instead: str = "") -> None:
    """Raise when a gate did not pass; the error carries `result`.

    Args:
        gates: what was judged.
        folder: of the run or the bundle.
        result: the document so far.
        instead: as for `optimize.judge.gate.stop`.

    Raises:
        GateRefused, BusyMachine: as `optimize.judge.gate.stop`.
    """
    try:
        gate.stop(gates, str(folder), instead)
    except (GateRefused, BusyMachine) as refusal:
        refusal.partial = result
        raise
