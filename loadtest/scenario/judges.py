"""Judges: what the phases of a scenario show together. A new one is a function and its row in `JUDGES`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.judge import trend
from loadtest.load.memory import Memory
from loadtest.plan import schedule
from loadtest.record import results
from loadtest.record.results import MISMATCH, OK, TIMEOUT, Results
from loadtest.record.statistics import Seconds, number, percentile, windows

SURE = 0.01
"""The largest p-value that counts as shown."""
GROWTH = 0.05
"""Share of its size that memory may grow by over the judged part of a soak."""
DRIFT = 0.1
"""Share that the median latency may climb by, and the speed may fall by, over the judged part of a soak."""
GAIN = 0.05
"""Share of more throughput below which a higher concurrency brought nothing."""
RECOVERED = 0.5
"""Share by which the median latency after a spike may lie above that before it."""
TWICE = 2.0
"""How many times that of the begin the median latency of a ramp is when it counts as climbed."""
SETTLING = 0.2
"""Share of a soak's begin that is not judged: caches and memory pools fill."""
_MOST_WINDOWS = 60
_FEWEST_PER_WINDOW = 10
_STEPS = 1000


@dataclass(frozen=True)
class Played:
    """A phase that was sent: its name, its document as `summary.summarize` returns it, and its result file."""

    name: str
    document: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class Finding:
    """One thing that a scenario shows.

    Args:
        name: of what was looked for.
        passed: None where there was not enough to say.
        text: one line.
        figures: what `text` is made of.
        optional: whether the scenario passes without it, because nobody asked for it.
    """

    name: str
    passed: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    optional: bool = False


@dataclass(frozen=True)
class Judge:
    """How a scenario is judged: `judge` looks at all phases, `enough` says after each whether to go on."""

    judge: Callable[[Sequence[Played], Memory], list[Finding]]
    enough: Callable[[Sequence[Played]], bool] = lambda played: False


def by_thresholds(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Find nothing of its own: the thresholds of the phases say it all."""
    return []


def soak(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Look for a leak, for latency that climbs and for a server that slows down, in the longest phase.

    Each is a test and a size: the trend must be shown (`SURE`) and its interval must lie beyond what is allowed.
    """
    at, latency, speed = _over_time(results.read(_longest(played).path))
    return [_leak(memory), _drift(at, latency), _throttling(at, speed)]


def _longest(played: Sequence[Played]) -> Played:
    return max(played, key=lambda phase: float(phase.document["plan"]["duration"]))


def _over_time(run: Results) -> tuple[Seconds, Seconds, Seconds]:
    """Return windows of the judged part: their middles, the median latency there and the speed.

    Speed is the throughput in a closed loop. An open one has its throughput from the plan, so there it is what one
    over the median service time says.
    """
    counted = run.of(OK, MISMATCH, TIMEOUT)
    done, latency = run.done[counted], (run.done - run.planned)[counted]
    service = (run.done - run.sent)[counted]
    if not run.of(OK, MISMATCH).any():
        return np.empty(0), np.empty(0), np.empty(0)
    # A last window that is only partly filled would look like a fall.
    end = float(run.planned.max())
    edges = windows(end, max(1, min(_MOST_WINDOWS, len(done) // _FEWEST_PER_WINDOW)))
    place = np.digitize(done, edges) - 1
    judged = [n for n in range(len(edges) - 1) if edges[n] >= SETTLING * end and (place == n).any()]
    medians = np.array([percentile(latency[place == n], 50) for n in judged])
    if run.open:
        speed = np.array([1 / percentile(service[place == n], 50) for n in judged])
    else:
        speed = np.array([(place == n).sum() / (edges[n + 1] - edges[n]) for n in judged])
    return (edges[:-1] + edges[1:])[judged] / 2, medians, speed


def _too_short(name: str, count: int) -> Finding | None:
    if count >= trend.FEWEST:
        return None
    return Finding(name, None, f"{name} not judged: {count} windows, {trend.FEWEST} are needed; let it run longer")


def _leak(memory: Memory) -> Finding:
    if not memory.source:
        text = "leak not judged: give --pid or --metrics to have the server's memory watched"
        return Finding("leak", None, text, optional=True)
    kept = memory.at >= SETTLING * memory.at.max(initial=0.0)
    at, used = memory.at[kept], memory.used[kept]
    if short := _too_short("leak", len(used)):
        return short
    whole, half = trend.line(at, used), len(at) // 2
    # A pool that fills climbs too, but stops; a leak goes on in the second half.
    later = trend.line(at[half:], used[half:]) if half >= trend.FEWEST else whole
    leaks = whole.p < SURE and whole.low > GROWTH and later.low > 0
    figures = {"change": whole.change, "low": whole.low, "high": whole.high, "p": whole.p, "source": memory.source}
    text = f"memory of {memory.source}: {_change(whole)} over {at[-1] - at[0]:.0f} s"
    return Finding("leak", not leaks, f"{'LEAK' if leaks else 'no leak shown'}: {text}", figures)


def _drift(at: Seconds, latency: Seconds) -> Finding:
    if short := _too_short("drift", len(at)):
        return short
    found = trend.line(at, latency)
    drifts = found.p < SURE and found.low > DRIFT
    figures = {"change": found.change, "low": found.low, "high": found.high, "p": found.p}
    text = f"{'DRIFT' if drifts else 'no drift shown'}: median latency {_change(found)}"
    return Finding("drift", not drifts, text, figures)


def _throttling(at: Seconds, speed: Seconds) -> Finding:
    if short := _too_short("throttling", len(at)):
        return short
    step, slope = trend.jump(speed), trend.line(at, speed)
    stepped = step.p < SURE and step.ratio < 1 - DRIFT
    slowed = slope.p < SURE and slope.high < -DRIFT
    figures = {"ratio": step.ratio, "at": float(at[step.at]), "p": step.p, "change": slope.change, "high": slope.high}
    if stepped:
        text = f"THROTTLING: speed fell to {step.ratio:.0%} at {at[step.at]:.0f} s"
    else:
        text = f"{'THROTTLING' if slowed else 'no throttling shown'}: speed {_change(slope)}"
    return Finding("throttling", not (stepped or slowed), text, figures)


def _change(found: trend.Trend) -> str:
    return f"{found.change:+.1%} ({found.low:+.1%} to {found.high:+.1%}, p {found.p:.2g})"


def climb(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Find the rate at which the median latency of the longest phase is twice that of its begin, and stays so."""
    run = results.read(_longest(played).path)
    # A request without an answer is slower than any.
    planned, latency = run.planned, np.where(run.of(OK, MISMATCH), run.done - run.planned, np.inf)
    edges = windows(
        float(planned.max(initial=0.0)) + 1e-6, max(1, min(_MOST_WINDOWS, len(planned) // _FEWEST_PER_WINDOW))
    )
    if short := _too_short("climb", len(edges) - 1):
        return [short]
    place = np.digitize(planned, edges) - 1
    medians = np.array([percentile(latency[place == n], 50) for n in range(len(edges) - 1)])
    begin = float(np.nanmedian(medians[: max(1, len(medians) // 5)]))
    if not np.isfinite(begin):
        return [Finding("climb", False, "NO ANSWERS: at the begin most requests were not answered")]
    above = np.append(medians > TWICE * begin, False)
    at = next((n for n in range(len(medians)) if above[n : n + 2].all()), None)
    if at is None:
        return [Finding("climb", True, f"no climb: the median stayed within {TWICE:g} times {number(begin * 1e3)} ms")]
    rate = float((place == at).sum() / (edges[at + 1] - edges[at]))
    text = f"climb: from {number(rate)} requests/s on the median is above {TWICE:g} times {number(begin * 1e3)} ms"
    return [Finding("climb", True, text, {"rate": rate, "at": float(edges[at]), "begin_ms": begin * 1e3})]


def saturated(played: Sequence[Played]) -> bool:
    """Return whether the last two phases brought no more throughput than the best before them."""
    rates = [phase.document["rate"]["achieved"] for phase in played]
    return len(rates) > 2 and max(rates[-2:]) < (1 + GAIN) * max(rates[:-2])


def saturation(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Find the knee: the lowest concurrency whose throughput is that of the best, but for `GAIN`."""
    rates = [phase.document["rate"]["achieved"] for phase in played]
    knee = next(n for n, rate in enumerate(rates) if rate >= max(rates) / (1 + GAIN))
    document, reached = played[knee].document, saturated(played)
    plan, latency = document["plan"], document["latency_ms"]
    figures = {"concurrency": plan["concurrency"], "rate": rates[knee], "p50_ms": latency["p50"], "reached": reached}
    figures |= {"p99_ms": latency["p99"], "most": max(rates)}
    text = f"{plan['concurrency']} in flight, {number(rates[knee])} requests/s, p99 {number(latency['p99'])} ms"
    if not reached:
        # Throughput was still rising at the end, or the last phases alone cannot tell.
        text = f"not reached: throughput rose to the last phase; so far {text}"
    return [Finding("knee", True if reached else None, f"knee: {text}", figures)]


def batch_sweep(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Find the batch of most samples per second; every batch's figures are among those of the finding."""
    rows = [
        {
            "batch": phase.document["parts"][0]["batch"],
            "samples": phase.document["rate"]["samples"],
            "p50_ms": phase.document["latency_ms"]["p50"],
            "p99_ms": phase.document["latency_ms"]["p99"],
        }
        for phase in played
    ]
    best = max(rows, key=lambda row: row["samples"])
    text = f"best batch: {best['batch']}, {number(best['samples'])} samples/s, p99 {number(best['p99_ms'])} ms"
    return [Finding("batch", best["samples"] > 0, text, {"best": best["batch"], "batches": rows})]


def recovery(played: Sequence[Played], memory: Memory) -> list[Finding]:
    """Find out whether the server came to itself: soon after the overload, backlog included, and in the last phase.

    The last phase sends what the first one did, after every answer of the overload was waited for; so it shows damage
    that stays, and only the time right after the overload shows the one that passes.
    """
    before, after = (phase.document["latency_ms"]["p50"] for phase in (played[0], played[-1]))
    ratio, back = after / before, after <= (1 + RECOVERED) * before
    text = f"median {number(before)} ms in {played[0].name}, {number(after)} ms in {played[-1].name}"
    figures = {"before_ms": before, "after_ms": after, "ratio": ratio}
    found = [Finding("recovery", back, f"{'recovered' if back else 'NOT RECOVERED'}: {text}", figures)]
    overloads = [phase for phase in played[1:-1] if phase.document["plan"].get("rate")]
    return [*found, *(_backlog(phase, played[0], (1 + RECOVERED) * before / 1e3) for phase in overloads)]


def _backlog(phase: Played, first: Played, limit: float) -> Finding:
    """Find how long after its overload a phase has latencies below `limit` seconds again, and for good."""
    run, end = results.read(phase.path), _overload_end(phase.document["plan"], first.document["plan"]["rate"])
    late = run.planned >= end
    latency = np.where(run.of(OK, MISMATCH), run.done - run.planned, np.inf)[late]
    rest = phase.document["plan"]["duration"] - end
    most = min(_MOST_WINDOWS, int(late.sum()) // _FEWEST_PER_WINDOW)
    edges = end + windows(rest, most) if rest > 0 else np.empty(0)
    if len(edges) - 1 < trend.FEWEST:
        return Finding("backlog", None, f"backlog of {phase.name} not judged: too few requests after the overload")
    place = np.digitize(run.planned[late], edges) - 1
    medians = np.array([percentile(latency[place == n], 50) for n in range(len(edges) - 1)])
    slow = np.flatnonzero(~(medians <= limit))
    seconds = float(edges[slow[-1] + 1] - end) if len(slow) else 0.0
    back = not len(slow) or bool(slow[-1] < len(medians) - 1)
    text = f"the median is below {number(limit * 1e3)} ms {number(seconds)} s after the overload of {phase.name}"
    if not back:
        text = f"{number(rest)} s after the overload of {phase.name} the median is above {number(limit * 1e3)} ms"
    return Finding("backlog", back, f"{'backlog gone' if back else 'BACKLOG STAYS'}: {text}", {"seconds": seconds})


def _overload_end(plan: dict[str, Any], usual: float) -> float:
    """Return the second of a phase at which it last asks for more than the usual rate."""
    at = np.linspace(0, plan["duration"], _STEPS + 1)
    rates = schedule.chosen("profile", plan["profile"])(at, plan["rate"], plan["duration"])
    above = np.flatnonzero(rates > 1.01 * usual)
    return float(at[min(above[-1] + 1, _STEPS)]) if len(above) else 0.0


JUDGES = {
    "thresholds": Judge(by_thresholds),
    "soak": Judge(soak),
    "climb": Judge(climb),
    "saturation": Judge(saturation, saturated),
    "batch-sweep": Judge(batch_sweep),
    "recovery": Judge(recovery),
}
