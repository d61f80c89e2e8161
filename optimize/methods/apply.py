"""Apply: one step, from what it needs to what its result must be."""

from dataclasses import replace
from typing import Any

from optimize.methods.table import BY_NAME, METHODS
from optimize.model.errors import BadWorkload, NoEffect
from optimize.source import splits
from optimize.source.batch import DATA
from optimize.source.workload import Workload
from optimize.step.contract import Context, Subject, fingerprint
from serve.config.target import Target


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
    result = method.apply(step, private, replace(context, methods=BY_NAME))
    if method.stage != "export" and fingerprint(result) == before:
        raise NoEffect(
            f"{method.name} changed nothing",
            fix=f"it could match: {', '.join(method.matches(subject)) or 'nothing in this model'}",
        )
    ensure.still_works(result, context.workload, method.name, context.target)
    return result
