"""Predictors: named arrays in, named arrays out, from a torch module, an ONNX file or a Triton endpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from modelathe.client import connect
from modelathe.errors import LatheError, UsageError
from modelathe.tensors import TRITON_DTYPES, Array, Arrays, TensorSpec, from_served, to_served
from optimize.graph import emulate
from optimize.machine import doctor, extra
from optimize.model.attention import without_fast_path
from optimize.model.errors import BadGraph, BadModel
from serve.config import gpu
from serve.config.target import Target
from serve.repository import onnx_file

RUN = "give it the inputs of the workload that it was made from, or make it again"
"""What to do about a graph that was loaded and does not run."""


def cut(inputs: Arrays, largest: int | None) -> Iterator[Arrays]:
    """Yield `inputs` in pieces of at most `largest` samples."""
    size = len(next(iter(inputs.values()), ()))
    for start in range(0, size, largest or max(size, 1)):
        yield {name: array[start : start + (largest or size)] for name, array in inputs.items()}


class Predictor(Protocol):
    """A context manager that answers `predict(arrays)`; every array has the batch axis first."""

    name: str

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the outputs by name for one batch."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


@contextmanager
def answering() -> Iterator[None]:
    """Run a module for its answers alone: without gradients, and without torch's fused paths, which an export lacks.

    Not in inference mode: a tensor that the module keeps of a call must serve a training and an export later.
    """
    with torch.no_grad(), without_fast_path():
        yield


def forward(module: nn.Module, inputs: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Call `module` with its inputs by name and return its outputs under the workload's names.

    Raises:
        BadModel: the model does not take these inputs, or returns something else than the declared tensors.
    """
    try:
        returned = module(**inputs)
    except (LatheError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also a model that wants the process to exit
        message = (str(error).strip().splitlines() or [""])[0]
        shapes = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in inputs.items())
        raise BadModel(
            f"does not take its inputs ({shapes}): {type(error).__name__}: {message}",
            where=type(module).__name__,
            fix="let the workload's inputs name the arguments of forward, with the dtypes and shapes that it takes",
        ) from error
    return _named(returned, names, type(module).__name__)


def _named(returned: Any, names: Sequence[str], where: str) -> dict[str, torch.Tensor]:
    fix = "name every returned tensor in the workload's outputs, or wrap the model in a module that returns only those"
    if isinstance(returned, torch.Tensor):
        returned = (returned,)
    if isinstance(returned, Mapping):
        if set(returned) != set(names):
            raise BadModel(
                f"returns a dict with {sorted(map(str, returned))}, outputs says {list(names)}", where=where, fix=fix
            )
        returned = tuple(returned[name] for name in names)
    if not isinstance(returned, tuple | list) or not all(isinstance(item, torch.Tensor) for item in returned):
        raise BadModel(f"returns {type(returned).__name__}, not tensors", where=where, fix=fix)
    if len(returned) != len(names):
        raise BadModel(
            f"returns {len(returned)} unnamed tensors, outputs names {len(names)}: {', '.join(names)}",
            where=where,
            fix=fix,
        )
    for name, tensor in zip(names, returned, strict=True):
        _check_sendable(name, tensor, where)
    return dict(zip(names, returned, strict=True))


def _check_sendable(name: str, tensor: torch.Tensor, where: str) -> None:
    if tensor.layout != torch.strided:
        raise BadModel(
            f"output {name!r} is sparse, which no server sends", where=where, fix="end forward with .to_dense()"
        )
    # The 16 bits of a training in mixed precision are not the model's own.
    known = torch.is_autocast_enabled(tensor.device.type) or str(tensor.dtype).removeprefix("torch.") in TRITON_DTYPES
    if not known:
        raise BadModel(
            f"output {name!r} is {str(tensor.dtype).removeprefix('torch.')}, which no server sends",
            where=where,
            fix="end forward with .float() or torch.view_as_real",
        )


def _last_line(error: Exception) -> str:
    """Return where OpenVINO says what is wrong: after the places that the error went through."""
    return [line.strip(" -") for line in str(error).splitlines() if line.strip()][-1]


class TorchPredictor:
    """A torch module on the CPU, in evaluation mode."""

    def __init__(self, module: nn.Module, outputs: Sequence[str]) -> None:
        self.name = "torch"
        self._module, self._outputs = module.eval(), outputs

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the module's outputs for one batch."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        with answering():
            outputs = forward(self._module, tensors, self._outputs)
        return {name: tensor.detach().resolve_neg().numpy() for name, tensor in outputs.items()}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is held open."""


def session_options(path: Path) -> Any:
    """Return ONNX Runtime's options for a file, which need not be one that it can load.

    It says only what is fatal: every failure is raised as well, and an export that is tried in vain should not chatter.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with suppress(OSError, LatheError):
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
        except LatheError:
            raise
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0]
            raise BadGraph(f"ONNX Runtime cannot load it: {message}", where=str(path), fix="export it again") from error
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
            message = (str(error).strip().splitlines() or [""])[0]
            raise BadGraph(f"ONNX Runtime cannot run it: {message}", where="model.onnx", fix=RUN) from error
        return dict(zip(self._outputs, values, strict=True))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the session go."""
        del self.session


@cache
def _openvino_core() -> Any:
    """Return the process's only OpenVINO core, kept until it ends.

    Each core gives the thread that compiles first a signal stack of its own. Of two cores the one that goes last
    restores the other's, which is unmapped by then, and the next Ctrl-C is a segmentation fault (OpenVINO 2026.4.1).
    """
    import openvino

    return openvino.Core()


class OpenVinoPredictor:
    """An ONNX file in OpenVINO on the CPU, set up for one call at a time on all cores that it may use.

    Where the CPU has instructions for it, OpenVINO computes what a float32 graph says in bfloat16; that is its default.

    Args:
        path: the file; external data beside it is found.
        device: `cpu`.
        cores: threads; 0 lets OpenVINO take every core.

    Raises:
        MissingExtra: the package openvino is not installed.
        BadGraph: the file is missing, or has an operator that OpenVINO does not know.
    """

    def __init__(self, path: Path, device: str = "cpu", cores: int = 0) -> None:
        extra.require("openvino")
        self.name = "openvino"
        settings: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if cores:
            settings["INFERENCE_NUM_THREADS"] = cores
        core = _openvino_core()
        try:
            model = core.read_model(str(path))
            self._compiled = core.compile_model(model, device.upper(), settings)
        except Exception as error:
            raise BadGraph(
                f"OpenVINO cannot load it: {_last_line(error)}",
                where=str(path),
                fix='use runtime = "onnxruntime", or leave out the step that put the operator in',
            ) from error
        self._request = self._compiled.create_infer_request()
        self._inputs = {port.get_any_name() for port in model.inputs}
        # Not the compiled model's names, which are also those of inner values that became one with an output.
        self._outputs = [port.get_any_name() for port in model.outputs]

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return the graph's outputs for one batch, in arrays of their own."""
        # OpenVINO would take what the call before has left in an input that is missing.
        if set(inputs) != self._inputs:
            raise BadGraph(
                f"OpenVINO cannot run it: the inputs are {sorted(self._inputs)}, given {sorted(inputs)}",
                where="model.onnx",
                fix=RUN,
            )
        try:
            values = self._request.infer(dict(inputs))
        except Exception as error:
            raise BadGraph(f"OpenVINO cannot run it: {_last_line(error)}", where="model.onnx", fix=RUN) from error
        return {name: values[index] for index, name in enumerate(self._outputs)}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the compiled model go."""
        del self._request, self._compiled


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


class EndpointPredictor:
    """A model behind a Triton endpoint: `grpc://HOST:PORT/MODEL[/VERSION]`, or the same with `http`.

    A batch that is larger than the server takes is sent in pieces.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        model, _, self._version = parts.path.strip("/").partition("/")
        if parts.scheme not in ("grpc", "http") or not parts.netloc or not model:
            raise UsageError(f"{url!r} is not an endpoint", fix="write grpc://HOST:PORT/MODEL[/VERSION], or http://…")
        self.name, self._model = "endpoint", model
        self._client = connect(f"{parts.scheme}://{parts.netloc}")

    def predict(self, inputs: Arrays) -> dict[str, Array]:
        """Return what the server answers for one batch."""
        specs, outputs = self._specs
        largest = min((spec.largest_batch for spec in specs if spec.batched), default=None)
        answers = [
            self._client.infer(self._model, to_served(specs, piece), version=self._version)
            for piece in cut(inputs, largest)
        ]
        return from_served(outputs, {name: np.concatenate([one[name] for one in answers]) for name in answers[0]})

    @cached_property
    def _specs(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        return self._client.metadata(self._model, self._version, own=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the connection."""
        self._client.close()
