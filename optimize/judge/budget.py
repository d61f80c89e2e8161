"""Budget: what the result of a recipe must keep and may cost."""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Budget:
    """What the result must keep and may cost.

    Args:
        keep: share of the trained model's metric to keep, for metrics bounded in [0, 1] of which more is better.
        max_drop: absolute loss of the metric that is allowed, a rise where less is better; not together with `keep`.
        bytes: largest ONNX file, in bytes.
        p99_ms: largest 99th percentile of latency, in ms, in the load test at the endpoint.
    """

    keep: float | None = Field(default=None, gt=0, le=1)
    max_drop: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    bytes: int | None = Field(default=None, gt=0)
    p99_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
