"""Cost: which share of the channels must go, so that a share of the cost is gone."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from optimize.judge import macs, measure
from optimize.judge.ruler import Until
from optimize.methods.export.onnx import export
from optimize.model.errors import BusyMachine, NoEffect

if TYPE_CHECKING:
    from optimize.step.contract import Context

Kind = Literal["macs", "parameters", "latency"]
STEPS = {"macs": 12, "parameters": 12, "latency": 6}
"""How often the interval is halved."""
NEAR = {"macs": 0.01, "parameters": 0.01, "latency": 0.03}
"""The search ends this near above the share that is wanted."""
SECONDS, PATIENCE = 3.0, 20.0
"""Seconds that one comparison of latencies takes, and how many more until its side of the wanted share is decided."""


def share(
    kind: Kind, wanted: float, original: nn.Module, cut: Callable[[float], nn.Module], context: "Context"
) -> float:
    """Return the smallest share of the channels whose removal removes `wanted` of the cost, by bisection.

    Args:
        kind: `macs` and `parameters` are counted; `latency` is that of one call of the ONNX export at the target's
            largest batch size, measured against that of `original` until it is clear of what is wanted. What counts is
            the lower end of its interval: where it is not decided, the share is not reached.
        wanted: share of the cost of `original`.
        original: the model before the first cut.
        cut: returns a copy of the model as it is now without a share of the original's channels.
        context: its workload, target, scratch folder and progress are used.

    Raises:
        NoEffect: the cost stays higher even with one channel left in each group; says what was reached.
        BadGraph: the cut model cannot be exported.
        BusyMachine: the original model counts as slower or faster than itself.
    """
    removed = _latency(original, wanted, context) if kind == "latency" else _counted(kind, original, context)
    low, high = 0.0, 1.0
    best = removed(cut(high))
    if not best >= wanted:
        raise NoEffect(
            f"prune.channels cannot remove {wanted:.0%} of the {kind}: without all channels that it may remove, "
            f"{max(best, 0):.0%} are gone",
            where=context.workload.name,
            fix="ask for less, exclude less, or leave round_to out",
        )
    for step in range(STEPS[kind]):
        middle = (low + high) / 2
        got = removed(cut(middle))
        context.progress(
            f"prune.channels: without {middle:.1%} of the channels, {got:.1%} of the {kind} are gone",
            (step + 1) / STEPS[kind],
        )
        if got >= wanted:
            high = middle
        else:
            low = middle
        if 0 <= got - wanted < NEAR[kind]:
            break
    return high


def _counted(kind: Kind, original: nn.Module, context: "Context") -> Callable[[nn.Module], float]:
    def count(module: nn.Module) -> int:
        found = macs.total(module, context.workload.inputs) if kind == "macs" else measure.parameters(module)
        if found is None:
            raise NoEffect(macs.UNKNOWN, where=context.workload.name, fix='say of = "parameters" or of = "latency"')
        return found

    whole = count(original)
    return lambda module: 1 - count(module) / max(whole, 1)


def _latency(original: nn.Module, wanted: float, context: "Context") -> Callable[[nn.Module], float]:
    workload, target = context.workload, replace(context.target, batch=(max(context.target.batch),))
    whole = export(original, workload.inputs, workload.outputs, context.scratch / "whole.onnx")

    def removed(module: nn.Module) -> float:
        part = export(module, workload.inputs, workload.outputs, context.scratch / "part.onnx")
        speeds = measure.speed(
            {"whole": whole, "part": part},
            workload.inputs,
            target,
            until=Until(decide=["part"], limit=1 / (1 - wanted), seconds=SECONDS, patience=PATIENCE),
        )
        (batch,) = target.batch
        if (control := speeds.control()[batch]).senseless:
            raise BusyMachine(
                f"{context.workload.name} before pruning against itself is {control} at batch {batch}",
                where="prune.channels",
                fix='run it again when nothing else runs here, or say of = "macs", which is counted',
            )
        low = speeds.ratios("part", "whole")[batch].low
        return 1 - 1 / low if low else -math.inf

    return removed
