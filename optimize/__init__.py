"""optimize: take a trained PyTorch model, prune, distill, quantize and export it, and prove what came out."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# Both runtimes report their use to their makers unless that is stopped before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from modelathe.tensors import BATCH, Dim, TensorSpec
    from optimize.calls.evaluation import compare, evaluate
    from optimize.calls.run import run
    from optimize.source.batch import Batch
    from optimize.source.workload import Workload

__all__ = ["BATCH", "Batch", "Dim", "TensorSpec", "Workload", "compare", "evaluate", "run"]
_PLACES = {
    **dict.fromkeys(("BATCH", "Dim", "TensorSpec"), "modelathe.tensors"),
    "Batch": "optimize.source.batch",
    "Workload": "optimize.source.workload",
    "run": "optimize.calls.run",
    **dict.fromkeys(("compare", "evaluate"), "optimize.calls.evaluation"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: a command's `--help` needs none of them (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
