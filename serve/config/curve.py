"""Curve: settings from the measured time of a call at several batch sizes, where the user has none of their own.

No delay is derived: with fixed dims it costs up to one more call, and on a CPU more than it brings
(`serve check` and docs/explanation/batcher.md say why). `serve tune` tries delays live.
"""

from collections.abc import Mapping
from dataclasses import replace

from serve.config.settings import Settings
from serve.config.target import Device

NEARLY = 0.95
"""A larger batch that brings less than the rest of the throughput only adds to the latency."""
SMALL = 1.0
"""Milliseconds. A shorter call is answered sooner by one thread: several spend more on waiting for each other."""


def fill(settings: Settings, latency_ms: Mapping[int, float], device: Device) -> Settings:
    """Return the settings with what the curve says: on a GPU the largest batch, on a CPU the threads of a small model.

    The batch is the smallest that reaches 95 % of the best throughput. A CPU batches as far as the target says, for
    there a longer batch costs little of what it brings.

    Args:
        settings: what was asked for stays.
        latency_ms: median milliseconds of a call by its batch size; at least one.
        device: of the target.
    """
    if device == "cpu":
        # The shortest call stands for one of batch 1, which is no longer.
        small = settings.threads is None and min(latency_ms.values()) < SMALL
        return replace(settings, threads=1) if small else settings
    throughput = {batch: batch / latency for batch, latency in latency_ms.items()}
    most = min(batch for batch, value in throughput.items() if value >= NEARLY * max(throughput.values()))
    return replace(settings, max_batch=most) if settings.max_batch is None else settings
