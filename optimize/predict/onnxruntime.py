"""ONNX Runtime: a file in it, on the CPU, on a GPU, or with TensorRT."""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

from modelathe.errors import ModelatheError
from modelathe.tensors import Array, Arrays
from optimize.machine import extra
from optimize.model.errors import BadGraph, first_line
from serve.config import gpu
from serve.repository import onnx_file

RUN = "give it the inputs of the workload that it was made from, or make it again"
"""What to do about a graph that was loaded and does not run."""


def session_options(path: Path) -> Any:
    """Return ONNX Runtime's options for a file, which need not be one that it can load.

    It says only what is fatal: every failure is raised as well, and an export that is tried in vain should not chatter.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with suppress(OSError, ModelatheError):
        if onnx_file.in_float16(path):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


class OnnxPredictor:
    """An ONNX file in ONNX Runtime.

    Args:
        path: the file; external data beside it is found.
        device: `cpu` or `cuda`. ONNX Runtime without a GPU falls back to the CPU in silence; here that is an error.
        cores: intra-op threads; 0 lets ONNX Runtime take every core.
        integers: run Q/DQ layers in INT8; else as the file says it, in float between them, which no CPU overflows.
    """

    gpu = "CUDAExecutionProvider"

    def __init__(self, path: Path, device: str = "cpu", cores: int = 0, integers: bool = True) -> None:
        self.name = "onnx"
        options = session_options(path)
        options.intra_op_num_threads = cores
        if not integers:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        wanted = {"cpu": "CPUExecutionProvider", "cuda": self.gpu}[device]
        try:
            try:
                self.session = self._opened(path, options, wanted)
            except Exception as error:
                if "float8" not in str(error):
                    raise
                # It takes a product of FP8 for one of INT8, and then refuses what it made of it.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                self.session = self._opened(path, options, wanted)
        except ModelatheError:
            raise
        except Exception as error:
            raise BadGraph(
                f"ONNX Runtime cannot load it: {first_line(error)}", where=str(path), fix="export it again"
            ) from error
        if wanted not in self.session.get_providers():
            raise BadGraph(
                f"ONNX Runtime has no {wanted} here", where=str(path), fix='use device = "cpu", or a GPU machine'
            )
        self._outputs = [output.name for output in self.session.get_outputs()]

    def _opened(self, path: Path, options: Any, provider: str) -> Any:
        import onnxruntime

        asked = gpu.CUDA if provider == OnnxPredictor.gpu else {}
        return onnxruntime.InferenceSession(str(path), options, providers=[(provider, asked)])

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the graph's outputs for one batch."""
        try:
            values = self.session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise BadGraph(f"ONNX Runtime cannot run it: {first_line(error)}", where="model.onnx", fix=RUN) from error
        return dict(zip(self._outputs, values, strict=True))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the session go."""
        del self.session


class TensorRtPredictor(OnnxPredictor):
    """An ONNX file in ONNX Runtime with TensorRT on a GPU, which was not run; on a CPU the same graph is emulated."""

    gpu = "TensorrtExecutionProvider"


class RtxPredictor(OnnxPredictor):
    """An ONNX file in ONNX Runtime with the plug-in of TensorRT for RTX on a GPU, which was not run; a CPU emulates it.

    Raises:
        MissingExtra: the plug-in is not installed.
        BadGraph: it takes no GPU of this machine.
    """

    gpu = "NvTensorRTRTXExecutionProvider"

    def _opened(self, path: Path, options: Any, provider: str) -> Any:
        if provider != self.gpu:
            return super()._opened(path, options, provider)
        import onnxruntime

        _register_rtx(provider)
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
        if not devices:
            raise BadGraph(
                "TensorRT for RTX finds no GPU here that it supports: it takes RTX GPUs, no H100 or H200",
                where=str(path),
                fix='use runtime = "onnxruntime" or "tensorrt", or a machine with an RTX GPU',
            )
        options.add_provider_for_devices(devices, {})
        return onnxruntime.InferenceSession(str(path), options)


@cache
def _register_rtx(name: str) -> None:
    """Make the plug-in known to ONNX Runtime, once in a process."""
    extra.require("tensorrt-rtx")
    import onnxruntime
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
