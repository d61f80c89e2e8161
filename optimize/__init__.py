"""optimize: take a trained PyTorch model, prune, distill, quantize and export it, and prove what came out."""

import os

# onnxruntime reports its use to its maker unless it is told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
