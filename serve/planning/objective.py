"""Objective: what a simulated endpoint must hold, as `p99 < 20ms, errors < 0.1%`, in the grammar of the load tests."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.judge import thresholds
from loadtest.judge.thresholds import Threshold
from loadtest.record.statistics import needed
from modelathe.errors import UsageError

_BELOW = ("<", "<=")
_SHARES = ("failed", "timed_out")


@dataclass(frozen=True)
class Judged:
    """What one condition says of one simulation.

    Args:
        text: the condition, as the user wrote it.
        measured: the figure, in the condition's unit; NaN where there is none.
        limit: what it may be, in the same unit.
        unit: as written.
        passed: whether it holds.
        low, high: the 95 % interval of the figure; NaN where chance has no part in it, or requests are too few to tell.
    """

    text: str
    measured: float
    limit: float
    unit: str
    passed: bool
    low: float = float("nan")
    high: float = float("nan")

    @property
    def hardly(self) -> bool:
        """Whether the interval holds the limit, so that more requests may say otherwise."""
        return self.low <= self.limit <= self.high

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)

    @property
    def excess(self) -> float:
        """How many times the limit the figure is: above 1 the condition is broken."""
        return self.measured / self.limit if self.limit else float(self.measured > 0)


@dataclass(frozen=True)
class Objective:
    """Conditions, all of which must hold.

    Args:
        text: as the user wrote it.
        conditions: each sentence, understood.
    """

    text: str
    conditions: tuple[Threshold, ...]

    @property
    def requests(self) -> int:
        """How many requests it takes to say that its percentiles hold."""
        return max((needed(one.percentile) for one in self.conditions if one.percentile is not None), default=1)

    @property
    def longest(self) -> float:
        """How many seconds a request may take at the most; 0 where nothing is said of that."""
        return max((one.seconds() for one in self.conditions if one.metric.kind == "time"), default=0.0)

    def judge(self, latency_ms: Mapping[str, float], requests: int, failed: float = 0.0) -> list[Judged]:
        """Return what each condition says.

        Args:
            latency_ms: as `loadtest.record.statistics.milliseconds` returns it; a failed request is infinitely late.
            requests: how many there were.
            failed: how many of them failed, a mean where it is no whole number.
        """
        counts = {"planned": requests, "failed": failed, "timed_out": 0}
        document: dict[str, Any] = {"judged_ms": {"latency_ms": latency_ms}, "requests": counts}
        found = []
        for one in self.conditions:
            measured = one.measured(document)
            found.append(Judged(one.text, measured, one.limit, one.unit, one.holds(measured)))
        return found


def parse(text: str) -> Objective:
    """Return the objective that sentences state.

    Raises:
        UsageError: a sentence that the grammar does not know, or that says nothing which a simulation can tell.
    """
    conditions = tuple(thresholds.parse([text]))
    for one in conditions:
        group, key = one.metric.group, one.metric.key
        late = group == "latency_ms" and key != "max"
        share = key in _SHARES and one.unit == "%"
        if not ((late or share) and one.comparison in _BELOW and one.limit > 0):
            raise UsageError(
                f"{one.text!r} is nothing that a simulation can hold",
                fix='write upper limits of latency and shares of errors, as "p99 < 20ms, errors < 0.1%"',
            )
    return Objective(text, conditions)
