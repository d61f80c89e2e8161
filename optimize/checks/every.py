"""Every check in its order: those that take moments and begin each run, and those of `optimize check`."""

from collections.abc import Callable

from modelathe.errors import ModelatheError
from optimize.checks import contract, data, noise, steps
from optimize.checks.finding import Check, Finding, all_of, one_by_one
from optimize.checks.subject import Subject

FIRST = (
    Check("read", contract.read),
    Check("target", steps.target),
    Check("steps", steps.needs),
    Check("model", contract.model),
    Check("scores", contract.scores, after=("model",)),
    Check("loss", contract.loss, after=("model",)),
    Check("calibration", data.calibration),
    Check("methods", steps.in_torch, after=("model",)),
)
"""What begins a run, and each method alone: one batch of each set is enough for it."""
LATER = (
    Check("data", data.sets),
    Check("noise", noise.metric, after=("scores", "data", "steps")),
    Check("export", steps.exported, after=("model",)),
)
"""What a run finds out by itself when it reads the data, judges and exports the trained model."""


def first(subject: Subject, progress: Callable[[str, float], None]) -> None:
    """Try the contract on one batch, before a run begins; tell what is doubtful.

    Raises:
        The first error of a check.
    """
    progress("trying the workload on one batch", 0.0)
    for finding in one_by_one(FIRST, subject):
        if finding.level == "warning" or finding.check == "arguments":
            progress(f"{finding.check}: {finding.what}{f'; {finding.fix}' if finding.fix else ''}", 0.0)


def every(subject: Subject, progress: Callable[[str, float], None]) -> tuple[list[Finding], list[ModelatheError]]:
    """Return what all checks find, and the errors among it."""
    return all_of((*FIRST, *LATER), subject, progress)
