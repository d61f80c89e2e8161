"""A configuration file for each kind of target, compared whole. UPDATE_GOLDEN=1 writes them anew."""

import os
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import gpu, model_config, settings
from serve.config.target import Target

GOLDEN = Path(__file__).with_name("golden")
TOKENS = Dim("tokens", 1, 32, 128)
TEXT = (TensorSpec("input_ids", "int64", (BATCH, TOKENS)), TensorSpec("attention_mask", "int64", (BATCH, TOKENS)))
EMBEDDING = (TensorSpec("embedding", "float32", (BATCH, 384)),)
IMAGE = (TensorSpec("image", "float32", (BATCH, 3, 224, 224)),)
LOGITS = (TensorSpec("logits", "float32", (BATCH, 10)),)
STEP = (
    TensorSpec("x", "float32", (BATCH, 8)),
    TensorSpec("start", "float32", (BATCH, 1)),
    TensorSpec("session", "uint64", (BATCH, 1)),
    TensorSpec("h", "float32", (BATCH, 16)),
)
NEXT = (TensorSpec("y", "float32", (BATCH, 8)), TensorSpec("h_next", "float32", (BATCH, 16)))
MEMORY = {"strategy": "oldest", "idle_s": 30, "start": "start", "id": "session", "state": {"h": "h_next"}}
CASES: dict[str, tuple[Any, Any, Target, dict[str, Any]]] = {
    "cpu": (TEXT, EMBEDDING, Target(cores=4), {}),
    "cpu_openvino": (IMAGE, LOGITS, Target(cores=4, runtime="openvino"), {}),
    "cpu_shared": (
        *(IMAGE, LOGITS, Target(cores=8)),
        {"instances": 2, "queue_delay_us": 500, "resources": {"memory": 1}, "weight": 2, "cache": True},
    ),
    "cpu_limited": (
        *(IMAGE, LOGITS, Target(cores=2)),
        {"queue": 64, "timeout_ms": 250, "on_timeout": "delay", "priorities": 3, "nonfinite": "refuse"},
    ),
    "cpu_unbatched": ((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (3,)),), Target(cores=2), {}),
    "cpu_sequence": (STEP, NEXT, Target(cores=2), {"sequence": MEMORY}),
    "cuda": (TEXT, EMBEDDING, Target(device="cuda", cores=8, batch=(1, 8, 64)), {"queue_delay_us": 200}),
    "cuda_two_gpus": (IMAGE, LOGITS, Target(device="cuda", cores=8), {"gpus": [0, 1], "instances": 2}),
    "cuda_tensorrt": (
        *(TEXT, EMBEDDING, Target(device="cuda", cores=8, batch=(1, 64))),
        {"accelerator": "tensorrt", "precision": "FP16", "cuda_graphs": True, "preferred": [8, 64]},
    ),
}


def built(name: str) -> ModelConfig:
    inputs, outputs, target, asked = CASES[name]
    return model_config.build("model", inputs, outputs, target, [1], settings.read(asked, name))


def agrees(name: str, config: ModelConfig) -> None:
    path = GOLDEN / f"{name}.pbtxt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(model_config.text(config))
    assert model_config.text(config) == path.read_text()
    assert model_config.parse(path.read_text()) == config


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_of_a_target(name: str) -> None:
    agrees(name, built(name))


def test_the_configuration_of_an_engine() -> None:
    agrees("plan", gpu.engine(built("cuda_tensorrt"), cuda_graphs=True))


DOCUMENTED = {
    *("precision_mode", "max_workspace_size_bytes", "trt_cuda_graph_enable"),
    *("trt_engine_cache_enable", "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
}
"""Parameters of the accelerator `tensorrt`, as the README of Triton's ONNX Runtime backend lists them."""
CUDA = {"cudnn_conv_algo_search", "prefer_nhwc"}
"""Parameters of the accelerator `cuda`; that README refers to ONNX Runtime's options of the CUDA provider."""


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("cuda")])
def test_the_fields_for_a_gpu_fit_the_schema_and_each_other(name: str) -> None:
    config = model_config.parse((GOLDEN / f"{name}.pbtxt").read_text())
    group = config.instance_group[0]
    assert group.kind == ModelInstanceGroup.KIND_GPU
    assert len(set(group.gpus)) == len(group.gpus)
    assert config.optimization.input_pinned_memory.enable
    assert not config.optimization.execution_accelerators.cpu_execution_accelerator
    assert all(size <= config.max_batch_size for size in config.dynamic_batching.preferred_batch_size)
    assert {sample.batch_size for sample in config.model_warmup} >= {1, config.max_batch_size}
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "cuda":
            assert set(accelerator.parameters) == CUDA
            continue
        assert accelerator.name == "tensorrt"
        assert set(accelerator.parameters) <= DOCUMENTED
        shapes = [accelerator.parameters[f"trt_profile_{size}_shapes"] for size in gpu.SIZES]
        read = [dict(entry.split(":") for entry in text.split(",")) for text in shapes]
        for tensor in config.input:
            sizes = [[int(size) for size in entry[tensor.name].split("x")] for entry in read]
            assert all(len(size) == len(tensor.dims) + 1 for size in sizes)
            assert all(low <= typical <= high for low, typical, high in zip(*sizes, strict=True))


def test_no_cpu_configuration_speaks_of_a_gpu() -> None:
    for path in GOLDEN.glob("cpu*.pbtxt"):
        text = path.read_text()
        assert not any(word in text for word in ("GPU", "gpu", "pinned", "cuda", "tensorrt")), path.name
