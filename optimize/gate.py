"""Gates: rules on quality, cost and parity that pass, or say no and what to do."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optimize import explain
from optimize.errors import BadRecipe, GateRefused
from optimize.evaluate import Difference, Score
from optimize.explain import Stage
from optimize.measure import Ratio
from optimize.recipe import Budget
from optimize.workload import Workload

DEFAULT_KEEP = 0.99
ROUNDING = 1e-12
"""Share of a score that the sums of its samples may be off."""
MOST_SAMPLES = 10**8
"""More evaluation samples than anybody has."""
SLOWER = 0.97
"""A promise of speed is broken when the whole interval of the alternating ratios lies below this."""


@dataclass(frozen=True)
class Gate:
    """One judgement: `measured` against `limit`, both as a person would read them, and advice when it did not pass."""

    name: str
    passed: bool
    measured: str
    limit: str
    advice: str = ""

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def check_budget(budget: Budget, workload: Workload) -> None:
    """Say before anything starts that the budget does not suit the metric.

    Raises:
        BadRecipe: a relative or missing budget for a metric that is not bounded in [0, 1].
    """
    if workload.bounded or budget.max_drop is not None:
        return
    raise BadRecipe(
        "keep = … needs a metric in [0, 1]; this workload does not say that its metric is",
        where=workload.name,
        fix="set max_drop in [budget], or bounded=True in the Workload",
    )


def check_metric(budget: Budget, trained: Score) -> None:
    """Say, once the trained model was judged, that the budget does not suit the metric.

    Raises:
        BadRecipe: a relative or missing budget for a metric of which less is better.
    """
    if budget.max_drop is None and not trained.higher_is_better:
        raise BadRecipe(
            f"keep = … keeps a share of what more is better of; of {trained.metric!r} less is better",
            where="[budget]",
            fix="set max_drop, the rise that is allowed",
        )


def quality(budget: Budget, trained: Score, result: Score, difference: Difference, strict: bool = False) -> Gate:
    """Judge what was lost of the first score, on its value or, `strict`, on the worse end of the paired interval.

    Args:
        budget: `max_drop` is absolute, for a metric of which less is better the rise that is allowed; `keep`, 0.99 when
            neither is given, is result over trained (MLPerf's rule).
        trained: the score of the trained model.
        result: the score that is judged.
        difference: result minus trained, paired by sample.
        strict: judge the end of the interval that is worse.

    Raises:
        BadRecipe: see `check_metric`.
    """
    check_metric(budget, trained)
    if budget.max_drop is not None:
        allowed = budget.max_drop
        limit = f"{'drop' if trained.higher_is_better else 'rise'} ≤ {allowed:g}"
    else:
        keep = DEFAULT_KEEP if budget.keep is None else budget.keep
        allowed = (1 - keep) * trained.value
        limit = f"≥ {keep:g} of {trained.value:.4f}"
    lost, _, worst = difference.loss
    # Sums of per-sample scores carry rounding; a loss of exactly the limit passes.
    limited = allowed + ROUNDING * max(1.0, abs(trained.value))
    known = all(map(math.isfinite, (trained.value, result.value, *difference.loss)))
    passed = known and (worst if strict else lost) <= limited
    interval = f"{difference.value:+.4f}, 95 % interval [{difference.low:+.4f}, {difference.high:+.4f}]"
    advice = "; ".join(
        filter(None, ("" if passed else _quality_advice(strict), _deciding(difference, result, limited)))
    )
    return Gate(f"quality: {result.metric}", passed, f"{result.value:.4f} ({interval})", limit, advice)


def _quality_advice(strict: bool) -> str:
    advice = "prune less, distill longer, or exclude layers from quantization; a larger max_drop accepts the loss"
    return f"{advice}; without --strict the value is judged" if strict else advice


def _deciding(difference: Difference, result: Score, allowed: float) -> str:
    """Say, where the interval holds the limit, how many samples it would take until it does not."""
    _, low, high = difference.loss
    if not low <= allowed < high:
        return ""

    def open_at(samples: int) -> bool:
        low, high = difference.loss_at(samples)
        return low <= allowed < high

    enough = len(result.samples)
    while open_at(enough):
        enough *= 2
        if enough > MOST_SAMPLES:
            return f"the interval holds the limit, and even {MOST_SAMPLES:,} samples would not decide"
    decide = bisect.bisect_left(range(enough), True, enough // 2, key=lambda samples: not open_at(samples))
    return f"the interval holds the limit: about {decide:,} samples decide"


def size(budget: Budget, measured: int) -> list[Gate]:
    """Judge the bytes of the result, when the budget names them."""
    if budget.bytes is None:
        return []
    advice = "" if measured <= budget.bytes else "prune more, or quantize"
    return [Gate("size", measured <= budget.bytes, f"{measured:,} bytes", f"≤ {budget.bytes:,} bytes", advice)]


def smaller(ratio: float, stages: Sequence[Stage]) -> Gate:
    """Judge the promise of a smaller file: trained FP32 ONNX bytes over the result's.

    Args:
        ratio: larger is better.
        stages: the trained model and every step's result, which say what it was that grew.
    """
    advice = "" if ratio > 1 else explain.larger(stages)
    return Gate("promise: smaller", ratio > 1, f"{ratio:.2f}×", "> 1×", advice)


def faster(batch: int, ratio: Ratio, stages: Sequence[Stage]) -> Gate:
    """Judge the promise of speed at one batch size, from alternating ratios of throughput (result over trained)."""
    passed = not ratio.high < SLOWER
    return Gate(
        f"promise: faster at batch {batch}",
        passed,
        f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"interval not wholly below {SLOWER}×",
        "" if passed else explain.slower(stages, batch),
    )


def parity(name: str, requests: int, mismatched: int, largest: float, tolerance: float) -> Gate:
    """Judge whether the endpoint answers what the bundle answers; nothing compared is no parity, and neither is NaN."""
    passed = requests > 0 and mismatched == 0 and largest <= tolerance
    return Gate(
        f"parity: {name}",
        passed,
        f"{mismatched} of {requests} differ, largest difference {largest:.2g}",
        f"≤ {tolerance:.2g}",
        "" if passed else "the server runs other bytes, another runtime or other inputs: compare its logs",
    )


def load(budget: Budget, report: dict[str, Any]) -> list[Gate]:
    """Judge the load test: valid, nothing failed, and the 99th percentile when the budget names it."""
    requests = report["requests"]
    wrong = requests["failed"] + requests["dropped"] + requests["mismatched"]
    why = report["why"] if isinstance(report["why"], str) else "; ".join(report["why"] or [])
    answered = report["valid"] is True and requests["done"] > 0 and wrong == 0
    gates = [
        Gate(
            "load: answered",
            answered,
            f"{requests['done']:,} answered, {wrong} not" + ("" if report["valid"] else ", run invalid"),
            "valid, all answered",
            "" if answered else why or "see the load report and the server's log",
        )
    ]
    if budget.p99_ms is not None:
        p99 = report["latency_ms"]["p99"]
        passed = p99 is not None and p99 <= budget.p99_ms
        advice = "" if passed else "lower the load, prune more, or give the target more cores"
        measured = "none answered" if p99 is None else f"{p99:.1f} ms"
        gates.append(Gate("load: p99", passed, measured, f"≤ {budget.p99_ms:g} ms", advice))
    return gates


def stop(gates: Sequence[Gate], where: str) -> None:
    """Raise when a gate did not pass.

    Raises:
        GateRefused: with every gate that said no in one line each.
    """
    refused = [gate for gate in gates if not gate.passed]
    if refused:
        lines = [f"{gate.name}: {gate.measured}, wanted {gate.limit}; {gate.advice}" for gate in refused]
        raise GateRefused("; ".join(lines), where=where, fix="change the recipe as advised, or publish with --force")
