"""Probe: one short run at one rate, judged by conditions; what `loadtest.probing.search` asks a real server for."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.judge import thresholds, validity
from loadtest.judge.summary import summary
from loadtest.judge.thresholds import Threshold
from loadtest.load import drive
from loadtest.plan.plan import Plan
from loadtest.plan.schedule import MOST_IN_FLIGHT
from loadtest.plan.traffic import Part
from loadtest.probing import edge
from loadtest.probing.search import Probe
from loadtest.record import results
from loadtest.record.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, Results
from modelathe.errors import ServerAbsent, UsageError

SETTLE = 0.5
"""Seconds at the start of a probe that do not count: it begins with an empty queue."""

IMPLIED = "errors < 1%"
"""Added where nothing is said of errors: a server that turns requests away answers the others all the faster."""

_BACKLOG = 8
_IDLE = 0.5
_LEAST_IN_FLIGHT = 64
_GUESS_IN_FLIGHT, _GUESS_SECONDS = 16, 2.0
_COUNTS = {"failed": (ERROR, TIMEOUT), "timed_out": (TIMEOUT,), "mismatched": (MISMATCH,)}


@dataclass(frozen=True)
class Condition:
    """A sentence as a share: at most `allowed` of the requests may be bad.

    Args:
        text: the sentence.
        allowed: share, above 0.
        threshold: the sentence, understood.
        limit: seconds above which a request is bad; None where its verdict makes it so.
    """

    text: str
    allowed: float
    threshold: Threshold
    limit: float | None = None

    def masks(self, run: Results) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which requests it speaks of and which of them are bad; a failed one is slower than any limit."""
        metric = self.threshold.metric
        if self.limit is None:
            return np.ones(len(run.planned), bool), run.of(*_COUNTS[metric.key])
        from_plan = metric.group == "latency_ms"
        # One that was not sent has no service time.
        counted = np.ones(len(run.planned), bool) if from_plan else ~run.of(DROPPED)
        took = run.done - (run.planned if from_plan else run.sent)
        return counted, counted & ~(run.of(OK, MISMATCH) & (took <= self.limit))


def conditions(sentences: Sequence[str]) -> list[Condition]:
    """Return what sentences such as `p99 < 20ms, errors < 0.1%` ask of every rate.

    Raises:
        UsageError: a wrong sentence, or one that says nothing of a share of the requests, such as a mean or a rate.
    """
    found = [_condition(threshold) for threshold in thresholds.parse(sentences)]
    if all(one.threshold.metric.key != "failed" for one in found):
        found += [_condition(threshold) for threshold in thresholds.parse([IMPLIED])]
    # What grows with the rate in every server comes first: a growing queue is laid to its charge.
    return sorted(found, key=lambda one: one.limit is None)


def _condition(threshold: Threshold) -> Condition:
    metric, text = threshold.metric, threshold.text
    below = threshold.comparison in ("<", "<=")
    if metric.group in ("latency_ms", "service_ms") and metric.key.startswith("p") and below:
        allowed = 1 - float(metric.key[1:].replace("999", "99.9")) / 100
        return Condition(text, allowed, threshold, threshold.seconds())
    if metric.key in _COUNTS and (threshold.unit == "%" and below and 0 < threshold.limit < 100):
        return Condition(text, threshold.limit / 100, threshold)
    if metric.key in _COUNTS and threshold.limit == 0 and threshold.comparison in ("==", "<="):
        return Condition(text, edge.LEAST_ALLOWED, threshold)
    raise UsageError(
        f"{text!r} cannot be searched for: it does not say which share of the requests may be bad",
        fix='write percentiles and shares, as "p99 < 20ms, errors < 0.1%, mismatches == 0"',
    )


def guess(plan: Plan, parts: Sequence[Part]) -> float:
    """Return a rate to begin with, from a short closed loop; it warms the server up as well."""
    closed = replace(plan, rate=None, concurrency=max(_GUESS_IN_FLIGHT, plan.workers), duration=_GUESS_SECONDS)
    run = _run(closed, parts, None)
    return max(0.7 * float(summary(run)["rate"]["achieved"]), 1.0)


def prober(
    plan: Plan,
    parts: Sequence[Part],
    asked: Sequence[Condition],
    folder: Path | None = None,
    show: Callable[[Probe], None] = lambda _: None,
) -> Callable[[float, float], Probe]:
    """Return the function that runs a probe at a rate for some seconds.

    Args:
        plan: its arrival, seed and url are used.
        parts: the traffic.
        asked: the conditions.
        folder: keeps the result files.
        show: called with every probe.
    """
    numbers = count()

    def probe(rate: float, seconds: float) -> Probe:
        n = next(numbers)
        # More in flight than this, and every request takes many times what it may: the server need not work them off.
        most = _BACKLOG * rate * max((one.limit for one in asked if one.limit is not None), default=np.inf)
        in_flight = int(np.clip(most, _LEAST_IN_FLIGHT, MOST_IN_FLIGHT * plan.workers))
        changed = replace(
            plan,
            concurrency=None,
            rate=rate,
            duration=SETTLE + seconds,
            warmup=0.0,
            seed=plan.seed + n,
            in_flight=-(-in_flight // plan.workers),
        )
        run = _run(changed, parts, folder / f"probe-{n + 1:02}.jsonl" if folder else None)
        found = measure(run, asked)
        show(found)
        return found

    return probe


def _run(plan: Plan, parts: Sequence[Part], path: Path | None) -> Results:
    with tempfile.TemporaryDirectory(prefix="modelathe-capacity-") as temporary:
        path = path or Path(temporary) / "probe.jsonl"
        drive.run(plan, parts, path)
        run = results.read(path)
    if (run.end or {}).get("gone"):
        load = f"{plan.rate:.4g} requests/s" if plan.rate else f"{plan.concurrency} requests in flight"
        raise ServerAbsent(f"the server stopped answering under {load}", where=plan.url, fix="look into its log")
    return run


def measure(run: Results, asked: Sequence[Condition], settle: float = SETTLE) -> Probe:
    """Return what a run says of the conditions; the first `settle` seconds do not count."""
    # A probe beyond the edge is full of failures: the conditions judge them, no limit is implied.
    document, plan = summary(run, [one.text for one in asked]), run.header["plan"]
    seconds = plan["duration"] - settle
    inside = run.planned >= settle
    block = np.clip((run.planned - settle) / seconds * edge.BLOCKS, 0, edge.BLOCKS - 1).astype(np.int64)

    def per_block(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(block[mask & inside], minlength=edge.BLOCKS)

    masks = [one.masks(run) for one in asked]
    answered = run.of(OK, MISMATCH, TIMEOUT) & inside
    total = np.bincount(block[answered], (run.done - run.planned)[answered], edge.BLOCKS)
    with np.errstate(invalid="ignore"):
        latency = total / per_block(answered)
    # At the lowest rates chance may leave a short probe without any request: it says nothing of the server.
    short = _short(document, asked)
    fault, client = _blame(document, short) if inside.any() else ("", "no request was due")
    return Probe(
        plan["rate"],
        np.array([per_block(counted) for counted, _ in masks]),
        np.array([per_block(bad) for _, bad in masks]),
        latency,
        fault=fault,
        client=client,
        idle=not short and document["client_cpu"] < _IDLE * document["client_cores"],
        facts={
            "seconds": seconds,
            "requests": int(inside.sum()),
            "latency_ms": document["latency_ms"],
            "backlog": document["backlog"],
        },
    )


def _short(document: dict[str, Any], asked: Sequence[Condition]) -> str:
    """Return how the client may have too few requests in flight to tell whether the server holds; empty if it has not.

    By Little's law, the requests of a full backlog take `most / rate` seconds or more: no fault if they may take that.
    """
    longest = max((one.limit for one in asked if one.limit is not None), default=0.0)
    full = validity.full_backlog(document)
    enough = not full or document["backlog"]["most"] >= document["plan"]["rate"] * longest
    return "" if enough else f"more in flight would be needed to tell, by --workers or `ulimit -n`: {full}"


def _blame(document: dict[str, Any], short: str) -> tuple[str, str]:
    """Return why the server holds nothing at this rate, whatever the conditions count, or why the client sent less."""
    why = str(document["why"])
    if document["requests"]["mismatched"] or not document["requests"]["done"]:
        return why, ""
    full = validity.full_backlog(document)
    return (full, "") if full and not short else ("", short or why)
