"""User line: the line of the user's own code that an error came from, and what that code was given."""

import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = ("optimize", "serve", "loadtest", "modelathe")
LONGEST = 100
"""Letters of a line that are shown."""


def is_users(file: Path) -> bool:
    """Say whether a Python file is neither Python's own, nor an installed package's, nor modelathe's."""
    installed = {"site-packages", "dist-packages"} & {*file.parts}
    ours = any(file.is_relative_to(Path(__file__).parents[2] / room) for room in OURS)
    return not installed and not ours and not file.is_relative_to(sysconfig.get_path("stdlib"))


def of(error: BaseException) -> tuple[str, str]:
    """Return `file, line N` and the text of the innermost line of the user's that raised `error`; empty for none."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}", (error.text or "").strip()[:LONGEST]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).suffix == ".py" and is_users(Path(frame.filename)):
            return f"{frame.filename}, line {frame.lineno}", (frame.line or "")[:LONGEST]
    return "", ""


def told(value: Any) -> str:
    """Return what a person needs to know of an array, a tensor, or a mapping of these: names, dtypes and shapes."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {told(inner)}' for name, inner in value.items())}}}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return "None" if value is None else type(value).__name__
