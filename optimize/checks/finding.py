"""Finding: what one check says; an error of it is raised by a run, and listed with all others by `optimize check`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelathe.errors import ModelatheError
from optimize.checks.subject import Subject


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and for a warning or an error where it is and what mends it."""

    level: Literal["ok", "warning", "error"]
    check: str
    what: str
    where: str = ""
    fix: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"level": self.level, "check": self.check, "what": self.what, "where": self.where, "fix": self.fix}


@dataclass(frozen=True)
class Check:
    """One thing that is looked at.

    Args:
        name: of what it looks at.
        look: yields what it finds that is right or doubtful; raises what is wrong.
        after: the checks without which it has nothing to look at.
    """

    name: str
    look: Callable[[Subject], Iterator[Finding]]
    after: tuple[str, ...] = ()


def ok(check: str, what: str) -> Finding:
    """Return what says that something is as it should be."""
    return Finding("ok", check, what)


def warning(check: str, what: str, fix: str, where: str = "") -> Finding:
    """Return what says that something may be wrong."""
    return Finding("warning", check, what, where, fix)


def one_by_one(checks: Iterable[Check], subject: Subject) -> Iterator[Finding]:
    """Yield what the checks find, and raise the first error of theirs."""
    for check in checks:
        yield from check.look(subject)


def all_of(
    checks: Sequence[Check], subject: Subject, progress: Callable[[str, float], None]
) -> tuple[list[Finding], list[ModelatheError]]:
    """Return what all checks find, errors too, and these errors; what has nothing to look at is left out."""
    found: list[Finding] = []
    errors: list[ModelatheError] = []
    missed: set[str] = set()
    for number, check in enumerate(checks):
        if missed & {*check.after}:
            missed.add(check.name)
            continue
        progress(f"checking: {check.name}", number / len(checks))
        try:
            found += check.look(subject)
        except ModelatheError as error:
            missed.add(check.name)
            errors.append(error)
            found.append(Finding("error", check.name, error.what, error.where, error.fix))
    return found, errors
