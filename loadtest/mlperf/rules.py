"""Rules: the four scenarios of MLPerf Inference, and what LoadGen 6.0 and its `mlperf.conf` ask of them.

What is computed here follows LoadGen's source (github.com/mlcommons/inference, `loadgen/`), so that the same latencies
give the same figures: `results.cc` for the metrics and the rules, `early_stopping.cc` for the estimates, `loadgen.cc`
for the schedules. An official result needs LoadGen itself; this says what one would be, from the same endpoint.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from loadtest.plan import schedule
from loadtest.record.results import MISMATCH, OK, Results
from loadtest.record.statistics import Seconds
from modelathe.errors import UsageError

CONFIDENCE = 0.99
SEED = 16159082839903944936
"""`schedule_rng_seed` of the rules; times differ from LoadGen's, whose generator is another one."""
OFFLINE_SAMPLES = 24_576
_SLACK = 1.1
_PERCENTILES = (0.5, 0.9, 0.95, 0.97, 0.99, 0.999)


@dataclass(frozen=True)
class Rules:
    """What a scenario asks of a run.

    Args:
        name: LoadGen's.
        percentile: of the latency that is estimated or held; 0 for Offline.
        duration: seconds that the run lasts at least.
        queries: that are issued at least; for Offline, samples.
        samples: in one query.
    """

    name: str
    percentile: float
    duration: float = 600.0
    queries: int = 100
    samples: int = 1


RULES = {
    "single-stream": Rules("SingleStream", 0.90),
    "multi-stream": Rules("MultiStream", 0.99, queries=662, samples=8),
    "server": Rules("Server", 0.99),
    "offline": Rules("Offline", 0.0, queries=OFFLINE_SAMPLES),
}


BOUNDS = {
    "resnet50": 0.015,
    "retinanet": 0.1,
    "bert": 0.13,
    "dlrm": 0.06,
    "dlrm-v2": 0.06,
    "dlrm-v3": 0.08,
    "rnnt": 1.0,
    "gptj": 20.0,
    "stable-diffusion-xl": 20.0,
    "qwen3-vl-235b-a22b": 12.0,
}
"""Seconds that 99 % of the Server scenario's queries must keep, by benchmark (`mlperf.conf`, `Server.target_latency`).

Benchmarks with bounds on the first and on each further token are not among them: a request here has one latency.
"""
TARGET_LATENCY = 0.01
"""`mlperf.conf`'s default; a bound of no benchmark."""


def official_rules(scenario: str, data: int) -> Rules:
    """Return the rules of a scenario for a data set of `data` samples; 0 for generated ones."""
    rules = RULES[scenario]
    # A data set smaller than the limit is sent once at least (mlperf.conf).
    return replace(rules, queries=min(rules.queries, data)) if data and scenario == "offline" else rules


@dataclass(frozen=True)
class Settings:
    """A run of one scenario.

    Args:
        scenario: a key of `RULES`.
        duration: seconds that it lasts at least.
        queries: issued at least; for Offline, samples.
        target_qps: Server: queries per second. Offline: samples per second that are expected.
        target_latency: Server: seconds that 99 % of the queries must keep.
        benchmark: MLPerf's that the model is, a key of `BOUNDS`; empty for none.
    """

    scenario: str
    duration: float
    queries: int
    target_qps: float = 0.0
    target_latency: float = TARGET_LATENCY
    benchmark: str = ""

    def __post_init__(self) -> None:
        for name, needed in (("target_qps", self.scenario in ("server", "offline")), ("target_latency", True)):
            value = getattr(self, name)
            if needed and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value:g}", fix=f"give --{name.replace('_', '-')} above 0")
        if not 0 < self.duration < float("inf") or self.queries < 1:
            raise UsageError("a run without a duration or without queries", fix="give both above 0")


def options(settings: Settings, batch: int, concurrency: int) -> dict[str, Any]:
    """Return the load as options of `loadtest run`.

    Args:
        settings: what to run.
        batch: Offline: samples in one request; the one query of the scenario is cut into them.
        concurrency: Offline: requests in flight.
    """
    rules = RULES[settings.scenario]
    common = {"seed": SEED, "batch": rules.samples}
    if settings.scenario == "server":
        due = _due(settings)
        return common | {
            "rate": settings.target_qps,
            "arrival": "poisson",
            "requests": len(due),
            "duration": due[-1] + 1e-3,
        }
    if settings.scenario == "offline":
        samples = max(settings.queries, ceil(_SLACK * settings.duration * settings.target_qps))
        # The end comes with the last sample; a server ten times slower than expected is not waited for.
        longest = 10 * max(settings.duration, samples / settings.target_qps)
        shape = {"concurrency": concurrency, "batch": batch, "requests": ceil(samples / batch), "duration": longest}
        return common | shape
    # The last query is issued after the asked duration, so one more has to fit in.
    return common | {"concurrency": 1, "duration": settings.duration + max(1.0, 0.01 * settings.duration)}


def _due(settings: Settings) -> list[float]:
    """Return the send times of the Server scenario: until both the duration and the queries are reached."""
    found: list[float] = []
    for at in schedule.times(settings.target_qps, float("inf"), SEED, "poisson"):
        found.append(at)
        if at >= settings.duration and len(found) >= settings.queries:
            break
    return found


def needed(over: int, percentile: float) -> int:
    """Return how many queries must be issued when `over` of them may be over the latency.

    So many that, were the true share below the latency no more than `percentile`, the chance of `over` or fewer would
    be below 1 - `CONFIDENCE` (`early_stopping.cc`).
    """
    from scipy.stats import binom

    most = range(over + 1, int(20 * (over + 10) / (1 - percentile)))
    return most[bisect_left(most, True, key=lambda queries: binom.cdf(over, queries, 1 - percentile) < 1 - CONFIDENCE)]


def discarded(queries: int, percentile: float) -> int:
    """Return the largest number of queries that may lie over a latency which then holds for `percentile`; 0 if none."""
    from scipy.stats import binom

    return max(0, int(binom.ppf(1 - CONFIDENCE, queries, 1 - percentile)) - 1)


def estimate(latencies: Seconds, percentile: float) -> float | None:
    """Return the latency that early stopping states for a percentile; None when the queries are too few.

    Args:
        latencies: of all queries, ascending, of shape [queries].
        percentile: a share, as in 0.9.
    """
    over = discarded(len(latencies), percentile)
    return float(latencies[len(latencies) - over]) if over else None


@dataclass(frozen=True)
class Rule:
    """One rule and what the run says to it.

    Args:
        name: in words.
        measured: by the run.
        asked: by its settings.
        official: by MLPerf.
        unit: of the three.
        most: whether it is an upper limit; otherwise a lower one.
    """

    name: str
    measured: float
    asked: float
    official: float
    unit: str = ""
    most: bool = False

    def met(self, limit: float) -> bool:
        """Return whether the run keeps a limit."""
        return self.measured <= limit if self.most else self.measured >= limit

    def text(self, limit: float) -> str:
        """Return the rule as it stands among those whose limit was not kept."""
        if not self.unit and limit == 1:
            return f"{self.name}: no"
        shown = (f"{value:,.0f}" if value >= 1e3 else f"{value:.4g}" for value in (self.measured, limit))
        measured, limit_text = (f"{value} {self.unit}".rstrip() for value in shown)
        return f"{self.name}: {measured}, asked {'at most' if self.most else 'at least'} {limit_text}"


@dataclass(frozen=True)
class Measured:
    """The latencies of a run as LoadGen defines them, and what follows from them.

    Args:
        latencies: seconds, one for each query, ascending; in Offline one for each request, from the run's begin.
        samples: answered.
        seconds: that count for the duration's rule.
        end: seconds until the last answer.
        failed: queries without an answer.
    """

    latencies: Seconds
    samples: int
    seconds: float
    end: float
    failed: int


def measured(settings: Settings, run: Results) -> Measured:
    """Return what a result file says in LoadGen's terms."""
    answered = run.of(OK, MISMATCH)
    start = 0.0 if settings.scenario == "offline" else run.planned[answered]
    latencies = np.sort(run.done[answered] - start)
    batches = [part["batch"] for part in run.header["parts"]]
    end = float(run.done[answered].max(initial=0.0))
    seconds = {
        "offline": end,
        "server": float(run.planned.max(initial=0.0)),
    }.get(settings.scenario, float(np.nanmax(run.sent, initial=0.0)))
    return Measured(latencies, len(latencies) * batches[0], seconds, end, int((~answered).sum()))


def rules(settings: Settings, found: Measured, data: int) -> Iterator[Rule]:
    """Yield the rules and what the run says to them.

    Args:
        settings: of the run.
        found: what it measured.
        data: samples of the data set; 0 when they were generated.
    """
    official, queries = official_rules(settings.scenario, data), len(found.latencies)
    offline = settings.scenario == "offline"
    yield Rule("duration", found.seconds, settings.duration, official.duration, "s")
    yield Rule(
        "samples" if offline else "queries", found.samples if offline else queries, settings.queries, official.queries
    )
    yield Rule("queries without an answer", found.failed, 0, 0, most=True)
    if settings.scenario == "server":
        # A bound of one's own choice keeps no rule of MLPerf.
        bound = BOUNDS.get(settings.benchmark, settings.target_latency)
        yield Rule("the bound of the latency is MLPerf's own (--benchmark)", float(settings.benchmark in BOUNDS), 0, 1)
        at = percentile(found.latencies, official.percentile)
        yield Rule("latency at 99 %", at * 1e3, settings.target_latency * 1e3, bound * 1e3, "ms", True)
        over, beyond = (int((found.latencies > limit).sum()) for limit in (settings.target_latency, bound))
        asked, enough = (needed(count, official.percentile) for count in (over, beyond))
        yield Rule(f"early stopping, {over} queries over the latency", queries, asked, enough, "queries")
    elif not offline:
        enough = needed(1, official.percentile)
        yield Rule("early stopping", queries, enough, enough, "queries")
    yield Rule("the samples are those of a data set (--data)", float(data > 0), 0, 1)


def percentile(latencies: Seconds, share: float) -> float:
    """Return what LoadGen calls a percentile of ascending latencies: the one at index `share` times their number."""
    return float(latencies[int(len(latencies) * share)]) if len(latencies) else float("nan")


def metric(settings: Settings, found: Measured) -> dict[str, Any]:
    """Return the scenario's metric: `name`, `value` (None where early stopping has too few queries) and `unit`."""
    official = RULES[settings.scenario]
    value: float | None
    if settings.scenario == "server":
        value = (len(found.latencies) - 1) / found.end if found.end else 0.0
        return {"name": "completed samples per second", "value": value, "unit": "1/s"}
    if settings.scenario == "offline":
        return {"name": "samples per second", "value": found.samples / found.end if found.end else 0.0, "unit": "1/s"}
    value = estimate(found.latencies, official.percentile)
    return {"name": f"early stopping {official.percentile:.0%} estimate", "value": value, "unit": "s"}


def figures(settings: Settings, run: Results, data: int) -> dict[str, Any]:
    """Return what a run shows in MLPerf's terms, as values of JSON.

    `result` is VALID when the run keeps its own settings, as LoadGen says it; `compliant` when it keeps MLPerf's.
    """
    found = measured(settings, run)
    checked = list(rules(settings, found, data))
    broken = [rule.text(rule.official) for rule in checked if not rule.met(rule.official)]
    unmet = [rule.text(rule.asked) for rule in checked if not rule.met(rule.asked)]
    latencies = found.latencies
    spread = {f"{share:.1%}": percentile(latencies, share) for share in _PERCENTILES}
    return {
        "compliant": not broken,
        "broken": broken,
        "result": "INVALID" if unmet else "VALID",
        "unmet": unmet,
        "scenario": RULES[settings.scenario].name,
        "metric": metric(settings, found),
        "queries": 1 if settings.scenario == "offline" else len(latencies),
        "samples": found.samples,
        "seconds": found.seconds,
        "latency_s": {
            "min": float(latencies.min(initial=np.inf)) if len(latencies) else None,
            "mean": float(latencies.mean()) if len(latencies) else None,
            "max": float(latencies.max(initial=0.0)),
            **spread,
        },
        "early_stopping": _early(settings, found),
    }


def _early(settings: Settings, found: Measured) -> dict[str, Any] | None:
    share = RULES[settings.scenario].percentile
    if settings.scenario == "offline":
        return None
    if settings.scenario == "server":
        over = int((found.latencies > settings.target_latency).sum())
        return {"over": over, "needed": needed(over, share), "queries": len(found.latencies)}
    shares = (share, 0.99) if share != 0.99 else (share,)
    return {
        "queries": len(found.latencies),
        "needed": needed(1, share),
        "estimates_s": {f"{one:.0%}": estimate(found.latencies, one) for one in shares},
    }
