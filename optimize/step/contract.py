"""Step: the contract of a compression method, and the one table of methods.

A method is one file: a frozen config whose type picks the function, and the function. It joins by a row in `METHODS`.
The files in the table import torch and onnx only inside their functions, so that `--help` stays light.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimize.methods.distill import features, logits, relations
from optimize.methods.export import fuse
from optimize.methods.export import onnx as export_onnx
from optimize.methods.prune import channels, heads, layers, weights
from optimize.methods.quantize import dynamic, fp8, half, mixed, nncf, qat, smooth, static, weight_only
from optimize.model.errors import BadWorkload, NoEffect
from optimize.source import splits
from optimize.source.workload import DATA, Workload
from serve.config.target import Target

if TYPE_CHECKING:
    from torch import nn

Subject = Any
"""An `nn.Module` before export, the `Path` of an ONNX file after."""


@dataclass(frozen=True)
class Context:
    """What a method may use beside its subject.

    Args:
        workload: the user's model, data and metric.
        trained: the trained model as the user brought it: the teacher. Not to be changed.
        target: where the result will run.
        seed: seeds every random choice.
        scratch: an empty folder of this step's own, gone when the step ends.
        checkpoint: a folder that outlives a killed run and is found again by the next one that makes the same bundle;
            None where nothing is kept.
        progress: called with a line of text, or with a text and a fraction in [0, 1].
    """

    workload: Workload
    trained: "nn.Module"
    target: Target
    seed: int
    scratch: Path
    progress: Callable[[str, float], None]
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        name: `family.method`, as recipes spell it.
        stage: what the method works on: the torch model, the ONNX graph, or the way from one to the other.
        promises: what the recipe's result owes because of this method: `smaller`, `faster`, both or neither.
        needs: `needs(config)` names the fields of the workload that must be there.
        apply: `apply(config, subject, context)`; gets a private copy and returns the new subject.
        matches: `matches(subject)` lists what the method could change, for the message when it changed nothing.
        selects: whether it chooses between models by their scores, on samples that do not judge the result.
        suited: `suited(config, target)` returns the config with what it leaves to the target; raises BadRecipe where
            the target's runtime lacks what the method writes.
    """

    name: str
    stage: Literal["torch", "export", "graph"]
    promises: frozenset[str]
    needs: Callable[[Any], Iterable[str]]
    apply: Callable[[Any, Subject, Context], Subject]
    matches: Callable[[Subject], list[str]]
    selects: bool = False
    suited: Callable[[Any, Target], Any] = lambda config, target: config


def nothing(_config: object) -> tuple[str, ...]:
    """Return what a method needs that needs nothing of the workload but its model."""
    return ()


METHODS: Mapping[type, Method] = {
    channels.Channels: Method(
        "prune.channels", "torch", frozenset({"smaller", "faster"}), channels.needs, channels.apply, channels.matches
    ),
    heads.Heads: Method(
        "prune.heads", "torch", frozenset({"smaller", "faster"}), heads.needs, heads.apply, heads.matches
    ),
    layers.Layers: Method(
        "prune.layers", "torch", frozenset({"smaller", "faster"}), layers.needs, layers.apply, layers.matches
    ),
    weights.Weights: Method("prune.weights", "torch", frozenset(), weights.needs, weights.apply, weights.matches),
    logits.Logits: Method("distill.logits", "torch", frozenset(), logits.needs, logits.apply, logits.matches),
    features.Features: Method(
        "distill.features", "torch", frozenset(), features.needs, features.apply, features.matches
    ),
    relations.Relations: Method(
        "distill.relations", "torch", frozenset(), relations.needs, relations.apply, relations.matches
    ),
    export_onnx.Onnx: Method("export.onnx", "export", frozenset(), nothing, export_onnx.apply, export_onnx.matches),
    fuse.Fuse: Method("export.fuse", "graph", frozenset(), nothing, fuse.apply, fuse.matches),
    smooth.Smooth: Method("quantize.smooth", "graph", frozenset(), smooth.needs, smooth.apply, smooth.matches),
    static.Static: Method(
        "quantize.static", "graph", frozenset({"smaller", "faster"}), static.needs, static.apply, static.matches
    ),
    qat.Qat: Method("quantize.qat", "export", frozenset({"smaller", "faster"}), qat.needs, qat.apply, qat.matches),
    mixed.Mixed: Method(
        "quantize.mixed",
        "graph",
        frozenset({"smaller", "faster"}),
        mixed.needs,
        mixed.apply,
        mixed.matches,
        selects=True,
        suited=mixed.suited,
    ),
    nncf.Nncf: Method("quantize.nncf", "graph", frozenset({"smaller", "faster"}), nncf.needs, nncf.apply, nncf.matches),
    dynamic.Dynamic: Method(
        "quantize.dynamic",
        "graph",
        frozenset({"smaller", "faster"}),
        nothing,
        dynamic.apply,
        dynamic.matches,
        suited=dynamic.suited,
    ),
    weight_only.WeightOnly: Method(
        "quantize.weight_only",
        "graph",
        frozenset({"smaller"}),
        nothing,
        weight_only.apply,
        weight_only.matches,
        suited=weight_only.suited,
    ),
    half.Half: Method(
        "quantize.half", "graph", frozenset({"smaller"}), half.needs, half.apply, half.matches, suited=half.suited
    ),
    fp8.Fp8: Method("quantize.fp8", "graph", frozenset({"smaller"}), fp8.needs, fp8.apply, fp8.matches),
}
NAMES: Mapping[str, type] = {method.name: config for config, method in METHODS.items()}


def quantizes(step: object) -> bool:
    """Say whether a step stores weights in fewer bits."""
    method = METHODS[type(step)]
    return method.name.startswith("quantize.") and "smaller" in method.promises


def for_target(step: Any, target: Target) -> Any:
    """Return the step with what its config leaves to the target.

    Raises:
        BadRecipe: the target's runtime lacks what the step's method writes.
    """
    return METHODS[type(step)].suited(step, target)


def check_needs(step: object, workload: Workload) -> None:
    """Say before anything starts that the workload lacks what `step` needs.

    Raises:
        BadWorkload: naming the missing field, too few samples to choose on, or a student that the workload has not.
    """
    method = METHODS[type(step)]
    for need in method.needs(step):
        if getattr(workload, need) is None:
            raise BadWorkload(
                f"{method.name} needs the workload's {need}",
                where=workload.source or workload.name,
                fix=f"give Workload a {need} function, or leave {method.name} out",
            )
    if method.selects:
        splits.selecting(workload, getattr(step, "judge_samples", 0))
    if student := getattr(step, "student", ""):
        workload.build(student)


def reads(step: object, workload: Workload) -> tuple[str, ...]:
    """Return which sets of the workload a step reads, beside the evaluation set."""
    method = METHODS[type(step)]
    kinds = {kind for kind in method.needs(step) if kind in DATA}
    if method.selects and (source := splits.source(workload)):
        # The samples that calibrate are no samples to choose on.
        kinds |= {source, *(("calibration",) if workload.calibration is not None else ())}
    return tuple(sorted(kinds))


def apply(step: object, subject: Subject, context: Context) -> Subject:
    """Run one step: what it requires, the method on a private copy, what it must ensure.

    Args:
        step: a config whose type stands in `METHODS`.
        subject: an `nn.Module` (torch and export stage) or the `Path` of an ONNX file (graph stage); left as it is.
        context: see `Context`.

    Returns:
        The new module, or the path of the new ONNX file inside `context.scratch`.

    Raises:
        BadRecipe: the target's runtime lacks what the method writes.
        BadWorkload: the workload lacks what the method needs.
        NoEffect: the method changed nothing.
        BadModel, BadGraph: the result does not run, or lost its outputs' names, shapes or finiteness.
    """
    from optimize.judge import ensure
    from optimize.model import copies, state

    method, step = METHODS[type(step)], for_target(step, context.target)
    check_needs(step, context.workload)
    if method.name.startswith("quantize."):
        state.refuse_double(context.trained, method.name)
    private = ensure.copy(subject, context.scratch)
    if method.name.startswith("prune."):
        # What a cut takes from a weight, its computation would put back.
        private = copies.folded(private)
    before = fingerprint(private)
    result = method.apply(step, private, context)
    if method.stage != "export" and fingerprint(result) == before:
        raise NoEffect(
            f"{method.name} changed nothing",
            fix=f"it could match: {', '.join(method.matches(subject)) or 'nothing in this model'}",
        )
    ensure.still_works(result, context.workload, method.name, context.target)
    return result


def fingerprint(subject: Subject) -> str:
    """Return a digest of a module's state, or of an ONNX file's bytes."""
    if not isinstance(subject, Path):
        from optimize.model import state

        return state.fingerprint(subject)
    data = hashlib.sha256()
    for file in sorted(subject.parent.glob(f"{subject.name}*")):
        data.update(file.read_bytes())
    return data.hexdigest()
