"""loadtest: drive a Triton endpoint and tell honestly what it holds. Imports neither torch nor the other rooms."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadtest.calls.capacity import capacity
    from loadtest.calls.run import run

__all__ = ["capacity", "run"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: a command's `--help` needs none of them (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"loadtest.calls.{name}"), name)
