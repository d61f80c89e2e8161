"""What a command may be given as SOURCE: a bundle, a workload or a Hugging Face folder."""

from pathlib import Path

from optimize.source.load import load_workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle


def load(source: str) -> Bundle:
    """Return the bundle in the folder `source`, or one in memory of the trained model of the workload `source`.

    Raises:
        BadBundle, BadWorkload: neither the one nor the other.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return bundles.load(Path(source))
    workload = load_workload(source)
    return Bundle(workload, workload.build())
