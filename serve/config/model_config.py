"""The Triton configuration of a model, derived from its TensorSpecs and Target, as Triton's own protobuf message.

Nothing in it is ours: Triton's own ONNX Runtime and OpenVINO backends read the same file.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (
    ModelConfig,
    ModelInput,
    ModelInstanceGroup,
    ModelOutput,
)

from modelathe.errors import BadInput
from modelathe.tensors import Dim, TensorSpec
from serve.config import cache, datatypes, gpu, sequences
from serve.config.errors import BadRepository
from serve.config.settings import Settings, check
from serve.config.target import TENSORRT, Target

LEAST_MAX_BATCH = 32
"""Throughput still rises up to batches of about 32 on a CPU, also when nobody measures at that size."""
DEFAULT = Settings()
NONFINITE = "modelathe.nonfinite"
"""A parameter that our backends read, and that others ignore."""


def build(
    model: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    target: Target,
    versions: Sequence[int],
    settings: Settings = DEFAULT,
) -> ModelConfig:
    """Return the configuration that serves `versions` of `model` on `target`.

    Requests are batched by the server when the first dim of every input and output is the batch axis, unless
    `max_batch` is 0.

    Raises:
        BadInput: there are no inputs or outputs, only some are batched, or a setting does not fit the model or the
            target.
    """
    if not inputs or not outputs:
        raise BadInput("a served model needs at least one input and one output")
    batch = max_batch_size([*inputs, *outputs], target, settings)
    if target.runtime in TENSORRT and settings.accelerator is None:
        settings = replace(settings, accelerator=cast(Literal["tensorrt", "tensorrt-rtx"], target.runtime))
    check(settings, inputs, outputs, target, batch)
    if not batch:
        inputs, outputs = ([spec.unbatched for spec in specs] for specs in (inputs, outputs))
    config = ModelConfig(name=model, backend=backend(target), max_batch_size=batch)
    inner = settings.inner()
    config.input.extend(stated(ModelInput(), spec, batch > 0) for spec in inputs if spec.name not in inner)
    config.output.extend(stated(ModelOutput(), spec, batch > 0) for spec in outputs if spec.name not in inner)
    config.version_policy.specific.versions.extend(versions)
    _add_instances(config, target, settings)
    _add_parameters(config, inputs, target, settings)
    if target.device == "cuda":
        gpu.add(config, inputs, settings)
    if settings.sequence:
        sequences.add(config, settings.sequence, {spec.name: spec for spec in (*inputs, *outputs)}, settings.instances)
    elif batch:
        _add_batching(config, settings)
    if settings.cache:
        config.response_cache.enable = True
    if reason := cache.refusal(config):
        raise BadInput(reason, where="settings", fix=cache.FIX)
    if settings.sequence:
        return config  # Triton warms up no model that remembers
    measured = {size for size in (*settings.preferred, *target.batch) if size <= batch}
    for size in sorted({1, max(batch, 1), *measured}):
        _warm_up(config, inputs, size)
    return config


def _add_parameters(config: ModelConfig, inputs: Sequence[TensorSpec], target: Target, settings: Settings) -> None:
    threads = settings.threads or max(1, target.cores // settings.instances)
    for key, value in PARAMETERS[backend(target)](threads, inputs, config.max_batch_size).items():
        config.parameters[key].string_value = value
    if settings.nonfinite == "refuse":
        config.parameters[NONFINITE].string_value = "refuse"
    if target.runtime == "openvino":
        # Triton's OpenVINO backend looks for its own format where no file is named.
        config.default_model_filename = "model.onnx"


def _add_instances(config: ModelConfig, target: Target, settings: Settings) -> None:
    kind = ModelInstanceGroup.KIND_GPU if target.device == "cuda" else ModelInstanceGroup.KIND_CPU
    # One instance with all cores: on a CPU, instances × threads above the cores halves the throughput.
    group = config.instance_group.add(name=config.name, count=settings.instances, kind=kind, gpus=settings.gpus)
    for name, count in sorted(settings.resources.items()):
        group.rate_limiter.resources.add(name=name, count=count)
    if settings.weight:
        group.rate_limiter.priority = settings.weight


def _add_batching(config: ModelConfig, settings: Settings) -> None:
    """Let the server batch. Without a setting nothing waits: under load batches form of what came meanwhile."""
    batching = config.dynamic_batching
    batching.SetInParent()
    batching.preferred_batch_size.extend(settings.preferred)
    batching.max_queue_delay_microseconds = settings.queue_delay_us or 0
    if settings.priorities:
        batching.priority_levels = settings.priorities
        # A request that asks for nothing comes last.
        batching.default_priority_level = settings.priorities
    policy = batching.default_queue_policy
    if settings.queue or settings.timeout_ms:
        # Not by default: with max_queue_size the dynamic batcher of Triton 24.10 misses wake-ups, and a request in a
        # few hundred then waits half a second (`benchmarks/queue_limit.py` shows it).
        policy.max_queue_size = settings.queue
        policy.default_timeout_microseconds = round(settings.timeout_ms * 1000)
        policy.timeout_action = policy.DELAY if settings.on_timeout == "delay" else policy.REJECT
        policy.allow_timeout_override = bool(settings.timeout_ms)


def _for_onnxruntime(threads: int, _inputs: Sequence[TensorSpec], _batch: int) -> dict[str, str]:
    # Threads that spin between operators save their waking; after a call they would take the cores from tritonserver.
    return {"intra_op_thread_count": str(threads), "session.force_spinning_stop": "1"}


def _for_openvino(threads: int, inputs: Sequence[TensorSpec], batch: int) -> dict[str, str]:
    parameters = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads)}
    # Triton's own backend runs nothing but full batches, and fills them up only where no other dim changes size.
    if batch and not any(isinstance(dim, Dim) for spec in inputs for dim in spec.dims[1:]):
        parameters["ENABLE_BATCH_PADDING"] = "YES"
    return parameters


PARAMETERS = {"onnxruntime": _for_onnxruntime, "openvino": _for_openvino}


def backend(target: Target) -> str:
    """Return the backend that serves a target's runtime: ONNX Runtime hands the graph to TensorRT."""
    return target.runtime if target.runtime in PARAMETERS else "onnxruntime"


def max_batch_size(specs: Sequence[TensorSpec], target: Target, settings: Settings = DEFAULT) -> int:
    """Return the largest batch that the server may form of tensors like `specs`; 0 when they have no batch axis.

    Raises:
        BadInput: if only some of them are batched.
    """
    axes = [spec.dims[0] for spec in specs if spec.batched]
    if not axes or settings.max_batch == 0:
        return 0
    lacking = [spec.name for spec in specs if not spec.batched]
    if lacking:
        raise BadInput(
            f"only some tensors are batched; {', '.join(lacking)} lack the batch axis",
            fix="give every input and output the batch axis, or none",
        )
    largest = min(axis.maximum for axis in axes if isinstance(axis, Dim))
    if settings.max_batch is not None:
        if settings.max_batch > largest:
            raise BadInput(
                f"max_batch = {settings.max_batch} is above the largest batch of the model, {largest}",
                fix="lower it, or raise the batch axis' maximum in the workload",
            )
        return settings.max_batch
    return min(largest, max(LEAST_MAX_BATCH, *target.batch))


def text(config: ModelConfig) -> str:
    """Return the content of `config.pbtxt`."""
    written: str = text_format.MessageToString(config)
    # The text format leaves a zero out, and Triton would then choose a batch size itself.
    return written if config.max_batch_size else f"{written}max_batch_size: 0\n"


def _renamed(config: ModelConfig) -> ModelConfig:
    """Return a configuration with the parameters of 0.1, `lathe.*`, under the names of today."""
    for key in [key for key in config.parameters if key.startswith("lathe.")]:
        config.parameters[f"modelathe.{key.partition('.')[2]}"].CopyFrom(config.parameters[key])
        del config.parameters[key]
    return config


def parse(text: str, where: str = "config.pbtxt") -> ModelConfig:
    """Return the message that `text` describes.

    Raises:
        BadRepository: if it is not a Triton model configuration.
    """
    try:
        return _renamed(text_format.Parse(text, ModelConfig()))
    except text_format.ParseError as error:
        raise BadRepository(
            f"not a Triton model configuration: {error}", where=where, fix="correct that line, or publish it again"
        ) from None


def stated(tensor: ModelInput | ModelOutput, spec: TensorSpec, batched: bool) -> ModelInput | ModelOutput:
    """Return `tensor` with what a configuration says of `spec`."""
    tensor.name = spec.name
    tensor.data_type = datatypes.of_dtype(spec.dtype)
    tensor.dims.extend(-1 if isinstance(dim, Dim) else dim for dim in spec.served.dims[batched:])
    if batched and not spec.own:
        # Triton knows no sample without dims: it carries one element, which the model sees without an axis.
        tensor.reshape.SetInParent()
    return tensor


def _warm_up(config: ModelConfig, inputs: Sequence[TensorSpec], size: int) -> None:
    """Add a warm-up request of `size` samples: the first real request must not pay for first-call work."""
    sample = config.model_warmup.add(name=f"batch-{size}", batch_size=size)
    for tensor, spec in zip(config.input, inputs, strict=True):
        entry = sample.inputs[spec.name]
        entry.data_type = tensor.data_type
        entry.dims.extend(spec.served.shape()[config.max_batch_size > 0 :])
        # Zero is a valid index, token and flag; random bytes of an integer input would be none of these. Those of a
        # float input hold NaN, and Triton 24.10 may crash when a model refuses its warm-up.
        if spec.dtype.startswith("float") and NONFINITE not in config.parameters:
            entry.random_data = True
        else:
            entry.zero_data = True
