"""Thresholds: what a run must show, in one-line sentences such as `p99 < 20ms` or `errors < 0.1%`.

The grammar; spaces stand between words, capitals do not matter::

    sentences  = sentence , { "," , sentence } ;
    sentence   = metric , comparison , number , [ unit ] ;
    metric     = time | count | rate ;
    time       = [ "latency" | "service" ] , statistic | "lag" , ( "p99" | "p99.9" | "max" ) ;
    statistic  = "mean" | "p50" | "p90" | "p95" | "p99" | "p99.9" | "max" ;
    count      = "requests" | "errors" | "timeouts" | "dropped" | "mismatches" ;
    rate       = "rate" | "samples" ;
    comparison = "<" | "<=" | ">" | ">=" | "==" | "!=" ;
    unit       = "us" | "ms" | "s"   (a time needs one)
               | "%"                 (of the planned requests, for a count)
               | "/s"                (for a rate, where it says nothing new) ;
"""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from loadtest.record.statistics import PERCENTILES, needed
from modelathe.errors import Refused, UsageError

_TIMES = {"us": 1e3, "µs": 1e3, "ms": 1.0, "s": 1e-3}
_UNITS = {"time": tuple(_TIMES), "count": ("", "%"), "rate": ("", "/s")}
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_STATISTICS = {"mean": "mean", "p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p99.9": "p999", "max": "max"}


@dataclass(frozen=True)
class Metric:
    """A figure that a sentence can speak of: `time`, `count` or `rate`, and where a run's document holds it."""

    kind: str
    group: str
    key: str


METRICS: dict[str, Metric] = {
    **{name: Metric("time", "latency_ms", key) for name, key in _STATISTICS.items()},
    **{f"latency {name}": Metric("time", "latency_ms", key) for name, key in _STATISTICS.items()},
    **{f"service {name}": Metric("time", "service_ms", key) for name, key in _STATISTICS.items()},
    **{f"lag {name}": Metric("time", "lag_ms", _STATISTICS[name]) for name in ("p99", "p99.9", "max")},
    "requests": Metric("count", "requests", "done"),
    "errors": Metric("count", "requests", "failed"),
    "timeouts": Metric("count", "requests", "timed_out"),
    "dropped": Metric("count", "requests", "dropped"),
    "mismatches": Metric("count", "requests", "mismatched"),
    "rate": Metric("rate", "rate", "achieved"),
    "samples": Metric("rate", "rate", "samples"),
}
_ALLOWED = (
    f"a metric: {', '.join(_STATISTICS)}, also after latency or service; lag p99, lag p99.9, lag max; "
    f"{', '.join(name for name, metric in METRICS.items() if metric.kind != 'time')}"
)
_PIECES = (
    (r"([a-zµ][a-z0-9.]*(?:\s+[a-z][a-z0-9.]*)?)", _ALLOWED),
    (r"([<>=!]=|[<>])", f"a comparison: {' '.join(_COMPARISONS)}"),
    (r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)", "a number, 0 or more"),
    (r"([a-zµ%/]*)", "a unit"),
)


@dataclass(frozen=True)
class Threshold:
    """One sentence, understood.

    Args:
        text: as the user wrote it.
        metric: what it speaks of.
        comparison: one of `<`, `<=`, `>`, `>=`, `==`, `!=`.
        limit: the number, in `unit`.
        unit: as written; empty for a plain count or rate.
    """

    text: str
    metric: Metric
    comparison: str
    limit: float
    unit: str

    def measured(self, document: dict[str, Any]) -> float:
        """Return what a run's document says of the metric, in the sentence's unit; NaN where it says nothing.

        A failed request is slower than any that was answered, and a closed loop's latency is the corrected one.
        """
        figures = document["judged_ms"] if self.percentile or self.metric.key == "mean" else document
        value = figures[self.metric.group].get(self.metric.key)
        if value is None:
            return float("nan")
        if self.unit == "%":
            planned = document["requests"]["planned"]
            return 100.0 * value / planned if planned else float("nan")
        return float(value) * _TIMES.get(self.unit, 1.0)

    @property
    def percentile(self) -> float | None:
        """Which percentile of the latency or service time it speaks of; None for any other metric."""
        return PERCENTILES.get(self.metric.key) if self.metric.group in ("latency_ms", "service_ms") else None

    def too_few(self, document: dict[str, Any]) -> str:
        """Return why a run has too few requests to say so much of a percentile, and how many would do; else empty."""
        if self.percentile is None:
            return ""
        requests, duration = document["requests"], document["plan"]["duration"]
        count, most = requests["done"] + requests["failed"] + requests["mismatched"], needed(self.percentile)
        if count >= most:
            return ""
        longer = f"; run for {ceil(duration * most / count):,} s at this rate" if count else ""
        return f"{count:,} requests are too few, {most:,} are needed{longer}"

    def seconds(self) -> float:
        """Return the limit of a time in seconds."""
        return self.limit / _TIMES[self.unit] / 1e3

    def holds(self, measured: float) -> bool:
        """Return whether the sentence is true of a figure in its unit; nothing is true of NaN."""
        return measured == measured and _COMPARISONS[self.comparison](measured, self.limit)


def judge(document: dict[str, Any], sentences: Iterable[str]) -> list[dict[str, Any]]:
    """Return `text`, `passed`, `undecided`, `why`, `measured` and `unit` (that of the sentence) for every sentence.

    A sentence that is true but rests on too few requests is undecided, which is not passed; `why` says how many it
    needs.

    Args:
        document: of a run, as `summary.summarize` returns it. An invalid run passes nothing.
        sentences: each may hold several, with commas between them.

    Raises:
        UsageError: a sentence that the grammar does not know; it says where, and what is allowed.
    """
    verdicts = []
    for threshold in parse(sentences):
        measured = threshold.measured(document)
        holds = bool(document["valid"]) and threshold.holds(measured)
        why = threshold.too_few(document) if holds else ""
        if measured == inf:
            why = "failed requests count as slower than any"
        verdict = {"text": threshold.text, "passed": holds and not why, "undecided": holds and bool(why), "why": why}
        verdicts.append({**verdict, "measured": measured, "unit": threshold.unit})
    return verdicts


def word(verdict: dict[str, Any]) -> str:
    """Return one verdict of `judge` in a word."""
    return "passed" if verdict["passed"] else "UNDECIDED" if verdict["undecided"] else "FAILED"


def line(verdict: dict[str, Any]) -> str:
    """Return one verdict of `judge` as a line of text."""
    measured = f"{verdict['measured']:.4g} {verdict['unit']}".rstrip()
    why = f"; {verdict['why']}" if verdict["why"] else ""
    return f"{word(verdict)}: {verdict['text']} (measured {measured}{why})"


def refusal(verdicts: Iterable[dict[str, Any]], where: str = "") -> Refused | None:
    """Return the failure that the verdicts of `judge` make of a run; None when all passed."""
    failed = [verdict for verdict in verdicts if not verdict["passed"]]
    if not failed:
        return None
    many = "a threshold" if len(failed) == 1 else f"{len(failed)} thresholds"
    lines = "".join(f"\n  {line(verdict)}" for verdict in failed)
    if all(verdict["undecided"] for verdict in failed):
        return Refused(f"{many} undecided{lines}", where=where, fix="run longer, or ask for a lower percentile")
    return Refused(f"{many} failed{lines}", where=where, fix="find what became slower, or change the threshold")


def parse(sentences: Iterable[str]) -> list[Threshold]:
    """Return the thresholds that the sentences state.

    Raises:
        UsageError: a sentence that the grammar does not know; it says where, and what is allowed.
    """
    return [_threshold(sentence.strip()) for text in sentences for sentence in text.split(",")]


def _threshold(text: str) -> Threshold:
    at, found = 0, []
    for pattern, expected in _PIECES:
        match = re.compile(rf"\s*{pattern}").match(text.lower(), at)
        if not match:
            raise _wrong(text, at, expected)
        found.append((match[1], match.start(1)))
        at = match.end()
    (name, start), (comparison, _), (number, _), (unit, unit_at) = found
    metric = METRICS.get(" ".join(name.split()).replace("p999", "p99.9"))
    if metric is None:
        raise _wrong(text, start, _ALLOWED)
    if unit not in _UNITS[metric.kind]:
        known = " or ".join(unit or "none" for unit in _UNITS[metric.kind])
        raise _wrong(text, unit_at, f"a unit: {known}")
    if text[at:].strip():
        raise _wrong(text, at, "a comma or the end")
    return Threshold(text, metric, comparison, float(number), unit)


def _wrong(text: str, at: int, expected: str) -> UsageError:
    at += len(text[at:]) - len(text[at:].lstrip())
    place = f"at {text[at:].split()[0]!r}, character {at + 1}" if text[at:].strip() else "at its end"
    return UsageError(f"the threshold {text!r} is wrong {place}", fix=f"write there {expected}")
