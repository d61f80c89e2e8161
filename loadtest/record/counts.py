"""Counts: what a Triton server counted for a model."""

from dataclasses import dataclass, field, fields
from typing import Any

from modelathe.client import Client


@dataclass(frozen=True)
class Statistics:
    """What a Triton server counted for a model since it was loaded; the difference of two is what happened between.

    Counts are requests, but `inference_count` (samples) and `execution_count` (runs of the model, one per batch).
    `probes` are those of the successes that the probe of a `serve up` on this machine sent.
    Durations are nanoseconds summed over the successful requests. `batches` counts executions by the samples in them.
    """

    success: int = 0
    fail: int = 0
    success_ns: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    inference_count: int = 0
    execution_count: int = 0
    probes: int = 0
    batches: dict[int, int] = field(default_factory=dict)

    def _combine(self, other: "Statistics", sign: int) -> "Statistics":
        counts = [one.name for one in fields(self) if one.name != "batches"]
        sizes = sorted(self.batches | other.batches)
        batches = {size: self.batches.get(size, 0) + sign * other.batches.get(size, 0) for size in sizes}
        return Statistics(
            **{name: getattr(self, name) + sign * getattr(other, name) for name in counts},
            batches={size: count for size, count in batches.items() if count},
        )

    @property
    def possible(self) -> bool:
        """Whether a difference can be one: a model that is loaded anew begins to count at 0 again."""
        return all(getattr(self, one.name) >= 0 for one in fields(self) if one.name != "batches")

    def __sub__(self, other: "Statistics") -> "Statistics":
        return self._combine(other, -1)

    def __add__(self, other: "Statistics") -> "Statistics":
        return self._combine(other, 1)


def counted(client: Client, model: str, version: str = "") -> Statistics | None:
    """Return what the server has counted for the model, summed over its versions unless one is named.

    None where the server does not say it.
    """
    entries = client.model_stats(model, version)
    return None if entries is None else sum(map(statistics, entries), Statistics())


def statistics(entry: dict[str, Any]) -> Statistics:
    """Return what one entry of `model_stats` says, in the JSON form of either protocol."""
    stats = entry["inference_stats"]

    def read(key: str, part: str) -> int:
        # The JSON form of the gRPC message leaves zeros out and writes long integers as strings.
        return int(stats.get(key, {}).get(part, 0))

    return Statistics(
        success=read("success", "count"),
        fail=read("fail", "count"),
        success_ns=read("success", "ns"),
        queue_ns=read("queue", "ns"),
        compute_input_ns=read("compute_input", "ns"),
        compute_infer_ns=read("compute_infer", "ns"),
        compute_output_ns=read("compute_output", "ns"),
        inference_count=int(entry.get("inference_count", 0)),
        execution_count=int(entry.get("execution_count", 0)),
        batches={
            int(batch["batch_size"]): int(batch.get("compute_infer", {}).get("count", 0))
            for batch in entry.get("batch_stats", ())
        },
    )
