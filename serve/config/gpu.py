"""The part of a model's configuration that speaks to GPUs and TensorRT, in Triton's protobuf message.

What speaks to the CUDA provider ran on a GPU; the accelerators are checked against Triton's schema and the keys that
its ONNX Runtime backend documents.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.tensors import Dim, TensorSpec
from serve.config.settings import Settings

PLAN = "model.plan"
RTX = "tensorrt-rtx"
"""The accelerator that only our own backend knows: ONNX Runtime's plug-in for RTX GPUs."""
CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1"}
"""What ONNX Runtime's CUDA provider is told, in the server and beside it.

Its own default tries every algorithm of a convolution whenever a batch of a new size comes, which holds up the server,
and may take another one in each process. With channels last, float16 convolutions use tensor cores without transposes.
"""
SIZES = {"min": "minimum", "opt": "typical", "max": "maximum"}
"""TensorRT's names of the sizes in a profile, and ours."""


def here() -> bool:
    """Say whether this machine has an NVIDIA GPU."""
    return Path("/dev/nvidiactl").exists()


def add(config: ModelConfig, inputs: Sequence[TensorSpec], settings: Settings) -> None:
    """Write into the configuration what holds for a GPU: pinned memory, and the accelerator with cached engines."""
    optimization = config.optimization
    optimization.input_pinned_memory.enable = settings.pinned
    optimization.output_pinned_memory.enable = settings.pinned
    if not settings.accelerator:
        cuda = optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        for key, value in CUDA.items():
            cuda.parameters[key] = value
        return
    accelerator = optimization.execution_accelerators.gpu_execution_accelerator.add(name=settings.accelerator)
    rtx = settings.accelerator == RTX
    for key, value in (_for_rtx(settings) if rtx else _for_tensorrt(config.name, settings)).items():
        accelerator.parameters[key] = value
    shapes = profile(inputs)
    for size in SIZES if shapes else ():
        accelerator.parameters[f"{'nv' if rtx else 'trt'}_profile_{size}_shapes"] = joined_shapes(shapes, size)


def _for_tensorrt(model: str, settings: Settings) -> dict[str, str]:
    folder = f"/tmp/tensorrt-{model}"  # noqa: S108 a path in the server's container
    stated: dict[str, str] = {} if settings.precision == "FP32" else {"precision_mode": settings.precision}
    if settings.cuda_graphs:
        stated["trt_cuda_graph_enable"] = "1"
    for cache in ("engine", "timing"):
        stated |= {f"trt_{cache}_cache_enable": "1", f"trt_{cache}_cache_path": folder}
    return stated


def _for_rtx(settings: Settings) -> dict[str, str]:
    """Its engines are strongly typed: the graph says what computes in what."""
    return {"enable_cuda_graph": "1"} if settings.cuda_graphs else {}


def engine(config: ModelConfig, *, cuda_graphs: bool = False) -> ModelConfig:
    """Return the configuration that serves a TensorRT engine, `model.plan`, in the place of the ONNX file."""
    made = ModelConfig()
    made.CopyFrom(config)
    made.backend, made.default_model_filename = "tensorrt", PLAN
    # These speak to ONNX Runtime.
    made.parameters.clear()
    made.optimization.ClearField("execution_accelerators")
    if cuda_graphs:
        made.optimization.cuda.graphs = True
    return made


def profile(inputs: Sequence[TensorSpec]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the smallest, the typical and the largest shape of every input that has a dim which changes size."""
    return {
        spec.name: {short: spec.shape(size=size) for short, size in SIZES.items()}
        for spec in inputs
        if any(isinstance(dim, Dim) and dim.minimum < dim.maximum for dim in spec.dims)
    }


def joined_shapes(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], size: str) -> str:
    """Return shapes of `profile` as TensorRT's tools take them: `image:1x3x8x8,mask:1x8`."""
    return ",".join(f"{name}:{'x'.join(map(str, sizes[size]))}" for name, sizes in shapes.items())
