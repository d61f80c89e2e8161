"""Capability: the kinds of GPUs that the compiler of TensorRT for RTX knows, by NVIDIA's compute capability."""

CAPABILITIES = {
    "7.5": "SM75",
    "8.0": "SM80",
    "8.6": "SM86",
    "8.9": "SM89",
    "12.0": "SM120",
    "12.1": "SM121",
    "current": "CURRENT",
}
"""Compute capabilities that it compiles for, and what it calls them; `current` is the GPU of this machine."""
USUAL = ("8.9",)
"""The oldest GPUs that have FP8."""
WITHOUT_FP8 = ("7.5", "8.0", "8.6")
