"""serve: the model repository, its configuration, and a real Triton server. Never imports torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.calls.add import add
    from serve.calls.plan import plan
    from serve.calls.tune import tune
    from serve.calls.up import up

__all__ = ["add", "plan", "tune", "up"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: a command's `--help` needs none of them (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"serve.calls.{name}"), name)
