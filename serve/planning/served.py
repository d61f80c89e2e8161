"""Served: what a model's configuration in the repository says to the scheduler, and what of it a plan leaves out."""

from collections.abc import Iterator

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelQueuePolicy

from modelathe.errors import BadInput
from serve.simulate.configuration import Configuration, Level

THREADS = "intra_op_thread_count"
"""The parameter that says how many threads an instance has."""


def configuration(config: ModelConfig) -> Configuration:
    """Return the configuration of a model that is served alone.

    Raises:
        BadInput: it is an ensemble, or a model that remembers.
    """
    for kind in ("ensemble_scheduling", "sequence_batching"):
        if config.HasField(kind):
            raise BadInput(
                f"its {kind.replace('_', ' ')} is not simulated",
                where=config.name,
                fix="plan a model that is asked alone",
            )
    batching, microseconds = config.dynamic_batching, 1e-6
    threads = config.parameters[THREADS].string_value if THREADS in config.parameters else ""
    return Configuration(
        max_batch=max(1, config.max_batch_size),
        dynamic=config.HasField("dynamic_batching") and config.max_batch_size > 0,
        delay=batching.max_queue_delay_microseconds * microseconds,
        preferred=tuple(batching.preferred_batch_size),
        instances=max(1, sum(max(1, group.count) * max(1, len(group.gpus)) for group in config.instance_group)),
        fixed_shapes=all(dim > 0 for tensor in config.input for dim in tensor.dims),
        levels=_levels(config),
        threads=int(threads) if threads.isdigit() and int(threads) else 1,
    )


def _levels(config: ModelConfig) -> tuple[Level, ...]:
    batching = config.dynamic_batching
    usual = batching.default_queue_policy
    policies = [batching.priority_queue_policy.get(level, usual) for level in range(1, batching.priority_levels + 1)]
    return tuple(_level(policy) for policy in policies or [usual])


def _level(policy: ModelQueuePolicy) -> Level:
    return Level(
        policy.max_queue_size,
        policy.default_timeout_microseconds * 1e-6,
        policy.timeout_action == policy.DELAY,
        policy.allow_timeout_override,
    )


def left_out(configuration: Configuration) -> Iterator[str]:
    """Yield what the configuration says and the simulation of many replicas does not."""
    if configuration.delay:
        yield f"a delay of {configuration.delay * 1e6:,.0f} µs is planned as none: see what `serve check` says of it"
    if configuration.preferred and configuration.preferred != (configuration.max_batch,):
        yield "preferred batch sizes are planned as none"
    if len(configuration.levels) > 1:
        yield "priorities are planned as one level"
    if any(level.size or level.timeout for level in configuration.levels):
        yield "limits of the queue are not simulated: requests wait instead of being refused"
