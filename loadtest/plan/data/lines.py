"""A text file: one string per line, for a model whose only input takes strings. Empty lines are skipped."""

from pathlib import Path

import numpy as np

from loadtest.plan.data import files
from loadtest.plan.data.request import Data, Request, Signature, batched
from loadtest.plan.data.values import only_input, string_shape
from modelathe.errors import BadInput

_FIX = "write one text per line, in UTF-8"


def read(path: Path, signature: Signature, batch: int = 1) -> Data:
    """Return a sample for each line, cut into requests of `batch` samples.

    Raises:
        BadInput: the file is no text, has no lines, or the model takes something else than one string.
        UsageError: the model takes no batch of this size.
    """
    spec = only_input(str(path), signature.inputs)
    shape = string_shape(str(path), spec)
    found = [line for line in files.text(path, _FIX).splitlines() if line.strip()]
    if not found:
        raise BadInput("has no lines", where=str(path), fix=_FIX)
    samples = [Request({spec.name: np.full(shape, line.encode(), object)}) for line in found]
    return Data(batched(str(path), samples, signature, batch))
