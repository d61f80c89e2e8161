"""Describe: a model's configuration as a person reads it, from Triton's own message."""

from collections.abc import Iterator

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput

from serve.config import datatypes
from serve.config.model_config import NONFINITE
from serve.config.sequences import SLOTS_KEY

KINDS = {ModelInstanceGroup.KIND_CPU: "on the CPU", ModelInstanceGroup.KIND_GPU: "on each GPU"}


def lines(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield what the configuration says, as pairs of a heading and a text."""
    yield "runs in", config.backend or config.platform or "what Triton finds in the version's folder"
    versions = list(config.version_policy.specific.versions)
    yield "versions", ", ".join(map(str, versions)) or "as Triton chooses"
    yield "inputs", "; ".join(map(_tensor, config.input)) or "as the model has them"
    yield "outputs", "; ".join(map(_tensor, config.output)) or "as the model has them"
    steps = config.ensemble_scheduling.step
    if steps:
        yield "steps", " → ".join(step.model_name for step in steps)
        yield "batching", f"up to {config.max_batch_size} in one request; each step puts requests together by itself"
        return
    yield "instances", "; ".join(map(_group, config.instance_group)) or "as Triton chooses"
    yield "batching", _batching(config)
    if config.HasField("dynamic_batching"):
        yield from _queue(config)
    if config.HasField("sequence_batching"):
        sequence = config.sequence_batching
        slots = config.parameters[SLOTS_KEY].string_value if SLOTS_KEY in config.parameters else ""
        limit = f"; {slots} at a time in each instance, one more is refused" if slots else ""
        yield "sequences", f"end after {sequence.max_sequence_idle_microseconds / 1e6:g} s without a request{limit}"
        yield "state", ", ".join(f"{state.output_name} → {state.input_name}" for state in sequence.state) or "none"
    if config.optimization.input_pinned_memory.enable:
        yield "copies", "through pinned memory"
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        options = ", ".join(f"{key}={value}" for key, value in sorted(accelerator.parameters.items()))
        yield "accelerator", f"{accelerator.name}: {options}"
    if config.response_cache.enable:
        yield "cache", "answers that were given before come from memory"
    if NONFINITE in config.parameters:
        yield "NaN, infinity", "refused"
    own = {key: value.string_value for key, value in config.parameters.items() if key != NONFINITE}
    if own:
        yield "parameters", ", ".join(f"{key}={value}" for key, value in sorted(own.items()))
    yield "warm-up", ", ".join(str(sample.batch_size) for sample in config.model_warmup) or "none"


def _tensor(tensor: ModelInput | ModelOutput) -> str:
    dims = ", ".join("any" if dim < 0 else str(dim) for dim in tensor.dims)
    return f"{tensor.name} {datatypes.name(tensor.data_type).lower()} [{dims}]"


def _group(group: ModelInstanceGroup) -> str:
    gpus = f" {', '.join(map(str, group.gpus))}" if group.gpus else ""
    held = ", ".join(f"{resource.count} of {resource.name}" for resource in group.rate_limiter.resources)
    weight = group.rate_limiter.priority
    return (
        f"{group.count} {KINDS.get(group.kind, 'where Triton chooses')}{gpus}"
        + (f", holding {held}" if held else "")
        + (f", of weight {weight}" if weight else "")
    )


def _batching(config: ModelConfig) -> str:
    if not config.max_batch_size:
        return "none: one request at a time"
    text = f"up to {config.max_batch_size}"
    if config.HasField("sequence_batching"):
        return f"{text}, of different sequences"
    if not config.HasField("dynamic_batching"):
        return f"{text} in one request; requests are not put together"
    delay = config.dynamic_batching.max_queue_delay_microseconds
    text += f", a request waits up to {delay} µs for others" if delay else ", of what waits already"
    preferred = list(config.dynamic_batching.preferred_batch_size)
    return text + (f"; {', '.join(map(str, preferred))} run at once" if preferred else "")


def _queue(config: ModelConfig) -> Iterator[tuple[str, str]]:
    batching = config.dynamic_batching
    policy = batching.default_queue_policy
    limits = [f"{policy.max_queue_size} requests" if policy.max_queue_size else "any number of requests"]
    if policy.default_timeout_microseconds:
        after = "go to the end" if policy.timeout_action == policy.DELAY else "are refused"
        limits.append(f"which {after} after {policy.default_timeout_microseconds / 1000:g} ms")
    yield "queue", ", ".join(limits)
    if batching.priority_levels:
        yield "priorities", f"1 to {batching.priority_levels}, {batching.default_priority_level} unless asked"
