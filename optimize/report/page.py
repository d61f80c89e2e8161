"""The proof page: one self-contained HTML file written from an `optimize run` document."""

from pathlib import Path
from typing import Any


def write(document: dict[str, Any], folder: Path) -> Path:
    """Write the page into the run's folder and return its path."""
    return folder / "report.html"
