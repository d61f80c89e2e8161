"""optimize: take a trained PyTorch model, prune, distill, quantize and export it, and prove what came out."""

import os
import sys

# Both runtimes report their use to their makers unless that is stopped before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
