"""Curve: batch size and queue delay from the measured time of a call at several batch sizes.

For GPUs, where a large batch takes hardly longer than a small one. On a CPU waiting costs more than it brings, for a
request that waits alone has lost the whole delay, so nothing is derived there.
"""

from collections.abc import Mapping
from dataclasses import replace

from serve.config.settings import Settings

NEARLY = 0.95
"""A larger batch that brings less than the rest of the throughput only adds to the latency."""
WORTHWHILE = 2.0
"""How many times the throughput of single requests batching must bring before a request waits for others."""


def fill(settings: Settings, latency_ms: Mapping[int, float]) -> Settings:
    """Return the settings with `max_batch` and `queue_delay_us` taken from the curve where they were not asked for.

    The batch is the smallest that reaches 95 % of the best throughput; the delay is half the time of one sample alone.

    Args:
        settings: what was asked for stays.
        latency_ms: median milliseconds of a call by its batch size; at least one.
    """
    throughput = {batch: batch / latency for batch, latency in latency_ms.items()}
    most = min(batch for batch, value in throughput.items() if value >= NEARLY * max(throughput.values()))
    smallest = min(latency_ms)
    pays = throughput[most] >= WORTHWHILE * throughput[smallest]
    delay = round(1000 * latency_ms[smallest] / smallest / 2) if pays else 0
    return replace(
        settings,
        max_batch=most if settings.max_batch is None else settings.max_batch,
        queue_delay_us=delay if settings.queue_delay_us is None else settings.queue_delay_us,
    )
