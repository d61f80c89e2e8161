"""What of a model's configuration the scheduler looks at."""

from dataclasses import dataclass
from functools import cached_property

from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelQueuePolicy

THREADS = "intra_op_thread_count"
"""The parameter that says how many threads an instance has."""


@dataclass(frozen=True)
class Level:
    """The queue of one priority level, as `ModelQueuePolicy` states it.

    Args:
        size: the most requests that wait in it; 0 is without a limit.
        timeout: seconds after which a waiting request expires; 0 is never.
        delayed: an expired request goes behind its level instead of being refused.
        override: a request may bring a smaller timeout of its own.
    """

    size: int = 0
    timeout: float = 0.0
    delayed: bool = False
    override: bool = False

    def until(self, own: float) -> float:
        """Return the seconds after which a request with a timeout of its own expires; 0 is never.

        Its own counts where it is smaller than the level's, which must not be 0: Triton compares the two as numbers.
        """
        return own if self.override and 0 < own < self.timeout else self.timeout


@dataclass(frozen=True)
class Configuration:
    """One configuration of a model.

    Args:
        max_batch: the most samples in a batch, ≥ 1.
        dynamic: the dynamic batcher forms batches; without it each request is a call.
        delay: seconds that a request may wait for others.
        preferred: the preferred batch sizes; none is `max_batch`, as Triton has it.
        instances: how many run side by side, ≥ 1.
        fixed_shapes: no dim but the batch is free.
        levels: the queue of each priority level, the most urgent first; at least one.
        threads: threads of each instance; the times of a call are those for this number.
    """

    max_batch: int
    dynamic: bool = True
    delay: float = 0.0
    preferred: tuple[int, ...] = ()
    instances: int = 1
    fixed_shapes: bool = True
    levels: tuple[Level, ...] = (Level(),)
    threads: int = 1

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The preferred batch sizes in order, as Triton fills them in."""
        return tuple(sorted(set(self.preferred))) or (self.max_batch,)

    @cached_property
    def prefetches(self) -> bool:
        """Whether batches are formed before an instance waits for one: not with priorities or a queue policy."""
        first = self.levels[0]
        return len(self.levels) == 1 and not (first.size or first.timeout or first.override)


def stated(config: ModelConfig) -> Configuration:
    """Return what the scheduler takes from a model's `config.pbtxt`."""
    batching = config.dynamic_batching
    groups = config.instance_group
    threads = config.parameters[THREADS].string_value if THREADS in config.parameters else ""
    policies = batching.priority_queue_policy
    numbers = range(1, batching.priority_levels + 1)
    default = batching.default_queue_policy
    return Configuration(
        max_batch=max(1, config.max_batch_size),
        dynamic=config.HasField("dynamic_batching"),
        delay=batching.max_queue_delay_microseconds / 1e6,
        preferred=tuple(batching.preferred_batch_size),
        instances=sum(max(1, group.count) * _devices(group) for group in groups) or 1,
        fixed_shapes=all(dim >= 0 or tensor.allow_ragged_batch for tensor in config.input for dim in tensor.dims),
        levels=tuple(_level(policies.get(number, default)) for number in numbers) or (_level(default),),
        threads=int(threads) if threads.isdecimal() and int(threads) else 1,
    )


def _devices(group: ModelInstanceGroup) -> int:
    return max(1, len(group.gpus)) if group.kind == ModelInstanceGroup.KIND_GPU else 1


def _level(policy: ModelQueuePolicy) -> Level:
    return Level(
        size=policy.max_queue_size,
        timeout=policy.default_timeout_microseconds / 1e6,
        delayed=policy.timeout_action == ModelQueuePolicy.DELAY,
        override=policy.allow_timeout_override,
    )
