"""Files: reading them whole, with one clear line for whatever the file system or a parser says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelathe.errors import BadInput, ModelatheError


@contextmanager
def readable(path: Path, what: str, fix: str) -> Iterator[None]:
    """Turn everything that reading `path` raises into `BadInput`.

    Args:
        path: what is read inside the block.
        what: what it should be, as in `no .npz file`.
        fix: how to make one.
    """
    try:
        yield
    except ModelatheError:
        raise
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix=fix) from None
    except PermissionError:
        raise BadInput("may not be read", where=str(path), fix="change its permissions") from None
    except IsADirectoryError:
        raise BadInput(f"is a folder and {what}", where=str(path), fix=fix) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8 text: byte {error.start}", where=str(path), fix="save it as UTF-8") from None
    except Exception as error:  # what a parser says about damaged bytes has no common class
        words = " ".join(str(error).split())[:120]
        raise BadInput(f"is {what}: {words or type(error).__name__}", where=str(path), fix=fix) from error


def text(path: Path, fix: str) -> str:
    """Return a text file; a byte order mark at its beginning is dropped."""
    with readable(path, "no text file", fix):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadInput("is a pipe or a device, and is read more than once", where=str(path), fix="give a file")
        return path.read_text(encoding="utf-8-sig")


def from_json(path: Path, line: int, written: str, fix: str) -> Any:
    """Return the value that a piece of JSON states; `line` is that of the file, or 0 for the whole file."""
    try:
        return json.loads(written)
    except RecursionError:
        raise BadInput("is nested too deeply", where=place(path, line), fix=fix) from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if not line else f"column {error.colno}"
        raise BadInput(f"is not JSON: {error.msg} at {at}", where=place(path, line), fix=fix) from None
    except ValueError as error:
        raise BadInput(f"is not JSON: {error}", where=place(path, line), fix=fix) from None


def place(path: Path, line: int) -> str:
    """Return how a message names a line of a file."""
    return f"{path}: line {line}" if line else str(path)
