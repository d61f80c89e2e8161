"""Batch: named arrays with what judges their answers, and the user's code that makes them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelathe.errors import ModelatheError
from modelathe.tensors import Array, Arrays
from optimize.model import userline
from optimize.model.errors import BadData, BadWorkload, first_line

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


def guarded(call: Callable[[], Any], what: str, source: str, given: Mapping[str, Any] | None = None) -> Any:
    """Run the user's code; what it raises becomes one line that names the user's own file, its line and the text there.

    Args:
        call: runs it.
        what: it is called.
        source: of the workload.
        given: what the code is given, by name, of which names, dtypes and shapes are told.

    Raises:
        BadWorkload: whatever the code raised, also when it wants the process to exit.
    """
    try:
        return call()
    except (ModelatheError, KeyboardInterrupt):
        raise
    except BaseException as error:
        file = (source.rpartition(":")[0] if ".py:" in source else source) or what
        where, text = userline.of(error)
        said = f" at `{text}`" if text else ""
        arguments = ", ".join(f"{name} {userline.told(value)}" for name, value in (given or {}).items())
        said += f"; it was given {arguments}" if arguments else ""
        fix = "mend that line" if where else "run the file by itself to see the whole traceback, and mend it"
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(("optimize.", "loadtest.")):
            fix = "import it as today: from optimize import BATCH, Batch, Dim, TensorSpec, Workload"
        raise BadWorkload(
            f"{what} raised {type(error).__name__}: {first_line(error)}{said}", where=where or file, fix=fix
        ) from error
