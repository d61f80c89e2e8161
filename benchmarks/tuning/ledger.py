"""What was measured so far, kept after every cell, so that a part goes on where it was stopped."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelathe import files
from modelathe.commandline import finite
from optimize.report import page

OUTPUT = Path("build/bench/tune")
RESULTS = Path("benchmarks/results")
Figures = dict[str, float]


class OutOfTime(Exception):
    """The minutes are over; the next call goes on."""


class NotMeasured(Exception):
    """A cell could not be measured, as on a machine that is too busy; it says why, and the next call tries again."""


class Ledger:
    """The cells of one part.

    Args:
        part: its name.
        minutes: after which no other cell is begun.
    """

    def __init__(self, part: str, minutes: float) -> None:
        self.path, self.end = OUTPUT / f"{part}.json", time.monotonic() + 60 * minutes
        self.cells: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def once(self, key: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a cell holds; it is measured with these arguments where it holds nothing yet.

        Raises:
            OutOfTime: no other cell is begun.
        """
        if key not in self.cells:
            if time.monotonic() > self.end:
                raise OutOfTime
            self.keep(key, measure(*arguments))
        return self.cells[key]

    def keep(self, key: str, value: Any) -> None:
        """Keep what a cell holds."""
        self.cells[key] = value
        OUTPUT.mkdir(parents=True, exist_ok=True)
        files.write(self.path, json.dumps(finite(self.cells), indent=1))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return those that hold nothing yet."""
        return [key for key in keys if key not in self.cells]


@dataclass(frozen=True)
class Rule:
    """What a figure must be: `sign` is ≥ or ≤."""

    sign: str
    limit: float

    def reached(self, value: float) -> bool:
        """Judge one figure; NaN reaches nothing."""
        return value >= self.limit if self.sign == "≥" else value <= self.limit


def write(figures: Mapping[str, Figures], rows: Mapping[str, Any]) -> Path:
    """Write the figures and the cells of all parts, with the day and the machine, and return the file.

    Args:
        figures: by part.
        rows: what they were read from, by part.
    """
    day = time.strftime("%F")
    document = {"date": day, "machine": page.environment(), "figures": figures, "cells": rows}
    path = RESULTS / f"tune-{day}-cpu.json"
    files.write(path, json.dumps(finite(document), indent=1) + "\n")
    return path
