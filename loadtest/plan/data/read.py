"""Read: data of any kind, by what it is."""

from pathlib import Path

from loadtest.plan.data import folder, lines, npz, perf_analyzer, recorded
from loadtest.plan.data.files import readable
from loadtest.plan.data.request import Data, Signature
from modelathe.errors import BadInput

KINDS = {".npz": npz.read, ".json": perf_analyzer.read, ".txt": lines.read}
RECORDED = ".jsonl"
"""Recorded traffic, which may be of several models."""


def read(path: Path, signature: Signature, batch: int = 1, model: str = "") -> Data:
    """Return the requests that `path` holds: a folder, or a file whose ending is in `KINDS`.

    Args:
        path: the data.
        signature: of the model that it is for.
        batch: samples per request, where the data is made of samples.
        model: its name, for recorded traffic, of which it gets its own lines and those that name none; empty takes all.

    Raises:
        BadInput: the data cannot be used; the message names the file, the place in it and the way out.
        UsageError: the model takes no batch of this size.
    """
    with readable(path, "no data", "give a file or a folder"):
        is_folder = path.is_dir()
    if is_folder:
        return folder.read(path, signature, batch)
    if path.suffix == RECORDED:
        return recorded.read(path, signature, batch, model)
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        what = "its name does not say what it is" if path.exists() else "there is no such file or folder"
        raise BadInput(
            what, where=str(path), fix=f"give a folder, or a file that ends with {', '.join([*KINDS, RECORDED])}"
        )
    return kind(path, signature, batch)
