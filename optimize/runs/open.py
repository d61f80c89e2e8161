"""What a command or a Python call may be given: a bundle, a workload or a Hugging Face folder."""

import os
from pathlib import Path

from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle


def workload(source: Workload | str | os.PathLike[str]) -> Workload:
    """Return the workload itself, or the one that `path/to/file.py:function` or a Hugging Face folder names.

    Raises:
        BadWorkload: there is none.
    """
    return source if isinstance(source, Workload) else load_workload(os.fspath(source))


def load(
    source: Workload | str | os.PathLike[str], judge: Workload | None = None, *, unnamed: Workload | None = None
) -> Bundle:
    """Return the bundle in the folder `source`, or one in memory of the trained model of the workload `source`.

    Args:
        source: a bundle's folder, or as for `workload`.
        judge: a bundle's workload; the one that it names unless given.
        unnamed: that of a bundle which names none, since it was made in Python and has no file.

    Raises:
        BadBundle, BadWorkload: neither the one nor the other.
    """
    if not isinstance(source, Workload) and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return bundles.load(Path(source), judge, unnamed=unnamed)
    opened = workload(source)
    return Bundle(opened, opened.build())
