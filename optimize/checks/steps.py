"""Steps: what each step needs of the workload, the budget and the target, and whether it finds something to change."""

from collections.abc import Iterator
from pathlib import Path

from optimize.checks.finding import Finding, ok, warning
from optimize.checks.subject import Subject
from optimize.judge import gate, speed
from optimize.machine import extra
from optimize.methods import apply as steps_of
from optimize.methods.export.onnx import export
from optimize.methods.table import METHODS
from optimize.model.errors import NoEffect
from serve.repository import scratch


def target(subject: Subject) -> Iterator[Finding]:
    """Look for what the target's runtime needs.

    Raises:
        MissingExtra: a package of modelathe's that it needs is not installed.
    """
    aim = subject.target
    extra.require_runtime(aim.runtime)
    if lacking := speed.lacking(aim):
        yield warning(
            "target", f"speed is {lacking}", "run it on a machine that has one, or publish with --allow-unmeasured"
        )
    yield ok("target", f"{aim.runtime} on {aim.device}, {aim.cores} cores, batch {', '.join(map(str, aim.batch))}")


def needs(subject: Subject) -> Iterator[Finding]:
    """Look for what the budget and each step need of the workload.

    Raises:
        BadWorkload: the workload lacks it.
        BadRecipe: the budget does not suit the metric.
        MissingExtra: a package that a method needs is not installed.
    """
    if subject.budget is not None:
        gate.check_budget(subject.budget, subject.workload)
    for step in subject.steps:
        method = METHODS[type(step)]
        extra.require_method(method.name)
        steps_of.check_needs(step, subject.workload)
        wanted = ", ".join(method.needs(step))
        yield ok("steps", f"{method.name}: {f'needs {wanted}: there' if wanted else 'needs nothing but the model'}")


def in_torch(subject: Subject) -> Iterator[Finding]:
    """Ask each step on the torch model what it could change.

    Raises:
        NoEffect: nothing.
    """
    for step in subject.steps:
        student, container = (getattr(step, option, "") for option in ("student", "container"))
        if METHODS[type(step)].stage != "torch" or student:
            return  # from here on it is another model
        if not container:
            _refuse_idle(step, subject.module)
    yield from ()


def exported(subject: Subject) -> Iterator[Finding]:
    """Export the trained model, compare the file with it, and ask each step on the file what it could change.

    Raises:
        BadGraph, BadModel: it cannot be exported.
        NoEffect: a step finds nothing to change.
    """
    workload = subject.workload
    with scratch.folder() as place:
        graph = export(
            workload.build(), workload.inputs, workload.outputs, place / "model.onnx", real=subject.batch.inputs
        )
        size = sum(file.stat().st_size for file in place.iterdir())
        in_graph = [step for step in subject.steps if METHODS[type(step)].stage == "graph"]
        if in_graph:
            _refuse_idle(in_graph[0], graph)
    yield ok("export", f"{size:,} bytes of ONNX that answer as the model does")


def _refuse_idle(step: object, subject: object) -> None:
    method = METHODS[type(step)]
    if not method.matches(subject):
        where = "the ONNX file" if isinstance(subject, Path) else type(subject).__name__
        raise NoEffect(
            f"{method.name} finds nothing to change", where=where, fix=f"leave {method.name} out of the recipe"
        )
