"""Follower: what the processes beside the first do under torchrun. They train along with it, and nothing else.

The first process runs the command. Before a step that trains it tells the others what the step starts from; they
apply it to a model of their own, with their share of the training data, and throw the result away.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.methods import apply as steps
from optimize.methods.table import METHODS
from optimize.runs import recipe
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from optimize.train import processes
from serve.repository import scratch

if TYPE_CHECKING:
    from optimize.runs.recipe import Recipe


@contextmanager
def leading() -> Iterator[None]:
    """Run the command in this block; at its end the followers are told to end as well."""
    try:
        yield
    except Exception:
        _end()
        raise
    _end()


@contextmanager
def joined(step: Any, source: Bundle, plan: "Recipe", checkpoint: Path) -> Iterator[None]:
    """Have the followers apply `step`, if it trains, while this process does so; an error of one is one of all."""
    if not _together(step):
        yield
        return
    processes.tell(
        {
            "workload": source.workload.source,
            "bundle": str(source.folder or ""),
            "checkpoint": str(checkpoint),
            "recipe": recipe.Recipe((step,), plan.seed, target=plan.target).document(),
        }
    )
    with processes.agreeing():
        yield


def workload_for(step: Any, workload: Workload) -> Workload:
    """Return the workload that `step` is applied with: where all processes apply it, loaded anew in each.

    A random generator that its `training` function goes on drawing from is then in the same state in all of them.
    """
    return load_workload(workload.source) if _together(step) else workload


def follow() -> None:
    """Apply the steps that the first process tells of until it says that there are no more."""
    while told := processes.tell(None):
        # An error is the first process's to report; it has learnt of it.
        with suppress(Exception), processes.agreeing():
            _apply(told, load_workload(told["workload"]))


def _together(step: Any) -> bool:
    return processes.size() > 1 and "training" in METHODS[type(step)].needs(step)


def _apply(told: dict[str, Any], workload: Workload) -> None:
    plan = recipe.parse(told["recipe"])
    module = bundles.load(Path(told["bundle"]), workload).module if told["bundle"] else workload.build()
    with scratch.folder() as place:
        context = Context(
            workload, workload.build(), plan.target, plan.seed, place, lambda *_: None, Path(told["checkpoint"])
        )
        steps.apply(plan.steps[0], module, context)


def _end() -> None:
    if processes.size() > 1:
        processes.tell(None)
