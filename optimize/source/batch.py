"""Batch: named arrays with what judges their answers, and the user's code that makes them."""

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelathe.errors import ModelatheError
from modelathe.tensors import Array, Arrays
from optimize.model.errors import BadData, BadWorkload, first_line
from optimize.source.code import OURS, is_users

_ROOMS = [Path(__file__).parents[2] / room for room in OURS]
DATA = ("evaluation", "selection", "calibration", "training")


@dataclass(frozen=True)
class Batch:
    """Named input arrays with the batch axis first, and whatever `loss` and `scores` need to judge the outputs.

    `targets` is an array (one row a sample), a mapping of such arrays, or None.
    """

    inputs: Arrays
    targets: Any = None

    @property
    def size(self) -> int:
        """How many samples it has."""
        return len(next(iter(self.inputs.values())))


Batches = Callable[[], Iterable[Batch]]


def mean(scores: Array) -> float:
    """Return the mean, which is the figure unless a workload says otherwise."""
    return float(np.mean(scores))


def concatenate(parts: list[Any], what: str) -> Any:
    """Join per-batch arrays, or mappings of arrays, along the batch axis; None stays None.

    Raises:
        BadData: the batches differ in kind, keys or shape.
    """
    same = "let every evaluation batch have the same kind of targets"
    if any(isinstance(part, Mapping) for part in parts):
        keys = parts[0].keys() if isinstance(parts[0], Mapping) else ()
        if not all(isinstance(part, Mapping) and part.keys() == keys for part in parts):
            raise BadData(f"{what} has other keys in some batch", fix=same)
        return {key: concatenate([part[key] for part in parts], f"{what} {key!r}") for key in keys}
    if all(part is None for part in parts):
        return None
    arrays = [np.asarray(part) for part in parts]
    if len({array.shape[1:] for array in arrays}) > 1:
        raise BadData(f"{what} has another shape in each batch", fix="pad the evaluation batches to one length")
    if any(part is None or not array.shape for part, array in zip(parts, arrays, strict=True)):
        raise BadData(f"{what} is not an array in some batch", fix=same)
    return np.concatenate(arrays)


def _told(frames: traceback.StackSummary) -> str:
    """Return the last line of the user's that ran, as it is written: a notebook's cell has no file's name."""
    for frame in reversed(frames):
        file = Path(frame.filename)
        if is_users(file) and not any(file.is_relative_to(room) for room in _ROOMS):
            return f", in {frame.name}, line {frame.lineno}: {frame.line}"
    return ""


def guarded(call: Callable[[], Any], what: str, source: str) -> Any:
    """Run the user's code; what it raises becomes one line that names the user's own file and line.

    Raises:
        BadWorkload: whatever the code raised, also when it wants the process to exit.
    """
    try:
        return call()
    except (ModelatheError, KeyboardInterrupt):
        raise
    except BaseException as error:
        file = (source.rpartition(":")[0] if ".py:" in source else source) or what
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename.endswith(Path(file).name)]
        line = f", line {lines[-1]}" if lines else ""
        if not source:
            line = _told(frames)
        if isinstance(error, SyntaxError) and error.lineno:
            line = f", line {error.lineno}"
        what_to_run = "the file by itself" if source else "it by itself"
        fix = f"run {what_to_run} to see the whole traceback, and mend it"
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(("optimize.", "loadtest.")):
            fix = "import it as today: from optimize import BATCH, Batch, Dim, TensorSpec, Workload"
        raise BadWorkload(
            f"{what} raised {type(error).__name__}: {first_line(error)}", where=f"{file}{line}", fix=fix
        ) from error
