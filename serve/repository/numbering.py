"""Numbering: a version's number is given once and never again, whatever was removed or failed meanwhile.

Others remember a number: Triton's response cache keeps answers by model and version, and clients may ask for one. So
the repository notes the highest number that each model had, in a file that Triton passes over.
"""

import json
from pathlib import Path

from modelathe import files
from serve.config.errors import BadRepository
from serve.repository.tree import numbers

MARKS = ".numbers.json"
"""In the repository's folder: the highest number by model."""


def upcoming(place: Path, model: str) -> int:
    """Return the number of the model's next version.

    Raises:
        BadRepository: what was noted cannot be read.
    """
    return max(_read(place).get(model, 0), *numbers(place, model), 0) + 1


def take(place: Path, model: str, number: int) -> None:
    """Note that the number is given, before anybody can see its version; what fails afterwards leaves a gap.

    Raises:
        BadRepository: another command took it, or what was noted cannot be read.
    """
    with files.locked(place, wait=True):
        marks = _read(place)
        if number <= marks.get(model, 0):
            raise BadRepository(
                f"version {number} was published by another command meanwhile",
                where=str(place / model),
                fix="run it again",
            )
        _write(place, {**marks, model: number})


def keep(place: Path, model: str) -> None:
    """Note the numbers that there are, before some are removed: an older modelathe noted none.

    Raises:
        BadRepository: what was noted cannot be read.
    """
    with files.locked(place, wait=True):
        _write(place, {**_read(place), model: upcoming(place, model) - 1})


def _read(place: Path) -> dict[str, int]:
    path = place / MARKS
    try:
        marks = json.loads(path.read_text())
        return {str(model): int(number) for model, number in marks.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        raise BadRepository(
            "does not say which numbers were given",
            where=str(path),
            fix="remove it while no server runs over this repository",
        ) from None


def _write(place: Path, marks: dict[str, int]) -> None:
    files.write(place / MARKS, json.dumps(dict(sorted(marks.items())), indent=2) + "\n")
