"""What of a model's configuration the scheduler looks at."""

from dataclasses import dataclass


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
