"""Ratios of speed in words, for tables and pages, from the documents that `--json` prints."""

from collections.abc import Sequence
from typing import Any


def times(value: float | None) -> str:
    """Return `1.02×`; a ratio that is not known is null in the document."""
    return "unknown" if value is None else f"{value:.2f}×"


def interval(ends: Sequence[float | None]) -> str:
    """Return `[0.98, 1.02]`; an end that is not known is null in the document."""
    low, high = ends
    return f"[{low or 0:.2f}, {'∞' if high is None else f'{high:.2f}'}]"


def may_be_one(ends: Sequence[float | None]) -> bool:
    """Return whether an interval holds 1."""
    low, high = ends
    return (low is None or low <= 1) and (high is None or high >= 1)


def control(ratio: dict[str, Any]) -> str:
    """Return what the ruler says of the trained model against itself, and how far single rounds spread."""
    spread = " to ".join("unknown" if end is None else f"{end:.2f}" for end in ratio["spread"])
    return f"{times(ratio['value'])} {interval((ratio['low'], ratio['high']))}, spread {spread}"
