"""Runtimes: what runs an ONNX file for a target."""

from pathlib import Path

from optimize.graph import emulate
from optimize.machine import doctor
from optimize.predict.onnxruntime import OnnxPredictor, RtxPredictor, TensorRtPredictor
from optimize.predict.openvino import OpenVinoPredictor
from serve.config.target import Target

GraphPredictor = OnnxPredictor | OpenVinoPredictor
RUNTIMES: dict[str, type[GraphPredictor]] = {
    "onnxruntime": OnnxPredictor,
    "openvino": OpenVinoPredictor,
    "tensorrt": TensorRtPredictor,
    "tensorrt-rtx": RtxPredictor,
}
"""What runs an ONNX file, by `Target.runtime`."""


def open_graph(path: Path, target: Target) -> GraphPredictor:
    """Return an ONNX file in the target's runtime on the target's device, with the target's cores.

    Where a GPU is wanted and none is here, the CPU computes what the graph says in the GPU's place.

    Raises:
        MissingExtra: the runtime is not installed.
        BadGraph: the runtime cannot load the file.
    """
    runtime = RUNTIMES[target.runtime]
    if target.device == "cpu" or doctor.has_gpu():
        return runtime(path, target.device, target.cores)
    # A CPU's own arithmetic in INT8 is not the GPU's.
    with emulate.readable(path) as readable:
        return OnnxPredictor(readable, "cpu", target.cores, integers=False)
