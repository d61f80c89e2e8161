"""Gates: rules on quality, cost and parity that pass, or say no and what to do."""

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.judge import thresholds, validity
from optimize.judge import explain
from optimize.judge.budget import Budget
from optimize.judge.evaluate import Difference, Score
from optimize.judge.explain import Stage
from optimize.judge.ruler import CLEAR, FEWEST, LIMIT, Speeds, more_seconds
from optimize.model.errors import BadRecipe, BusyMachine, GateRefused
from optimize.source.workload import Workload

DEFAULT_KEEP = 0.99
ROUNDING = 1e-12
"""Share of a score that the sums of its samples may be off."""
MOST_SAMPLES = 10**8
"""More evaluation samples than anybody has."""
SLOWER = LIMIT
"""A promise of speed is kept where the whole interval of the ratio lies above this, and broken where it lies below."""


@dataclass(frozen=True)
class Gate:
    """One judgement: `measured` against `limit`, both as a person would read them, and advice when it did not pass.

    `machine` says that nothing was found out about the model, because the machine could not measure; `undecided` that
    the figures do not tell which side of the limit it is on, whatever the value said.
    """

    name: str
    passed: bool
    measured: str
    limit: str
    advice: str = ""
    machine: bool = False
    undecided: bool = False

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


def allowed(budget: Budget, trained: Score) -> float:
    """Return how much of the trained model's first score may be lost."""
    return (1 - _kept(budget)) * trained.value if budget.max_drop is None else budget.max_drop


def _kept(budget: Budget) -> float:
    return DEFAULT_KEEP if budget.keep is None else budget.keep


def quality(
    budget: Budget,
    trained: Score,
    result: Score,
    difference: Difference,
    strict: bool = False,
    steps: Collection[str] = (),
) -> Gate:
    """Judge what was lost of the first score, on its value or, `strict`, on the worse end of the paired interval.

    Args:
        budget: `max_drop` is absolute, for a metric of which less is better the rise that is allowed; `keep`, 0.99 when
            neither is given, is result over trained (MLPerf's rule).
        trained: the score of the trained model.
        result: the score that is judged.
        difference: result minus trained, paired by sample.
        strict: judge the end of the interval that is worse.
        steps: names of the methods that made the result, which the advice is about.

    Raises:
        BadRecipe: see `check_metric`.
    """
    check_metric(budget, trained)
    if budget.max_drop is not None:
        limit = f"{'drop' if trained.higher_is_better else 'rise'} ≤ {budget.max_drop:g}"
    else:
        limit = f"≥ {_kept(budget):g} of {trained.value:.4f}"
    lost, _, worst = difference.loss
    # Sums of per-sample scores carry rounding; a loss of exactly the limit passes.
    limited = allowed(budget, trained) + ROUNDING * max(1.0, abs(trained.value))
    known = all(map(math.isfinite, (trained.value, result.value, *difference.loss)))
    passed = known and (worst if strict else lost) <= limited
    interval = f"{difference.value:+.4f}, 95 % interval [{difference.low:+.4f}, {difference.high:+.4f}]"
    refusal = "" if passed else _quality_advice(steps, known and lost <= limited)
    deciding = _deciding(difference, result, limited)
    advice = "; ".join(filter(None, (refusal, deciding)))
    measured = f"{result.value:.4f} ({interval})"
    return Gate(f"quality: {result.metric}", passed, measured, limit, advice, undecided=bool(deciding))


LOSE_LESS = {
    "prune.": "prune less",
    "distill.": "distill longer",
    "quantize.": "exclude layers from quantization, or let quantize.mixed find them (it leaves nodes without weights "
    "float too)",
}
"""What makes up for a loss, by the family of the methods that caused or mend it."""


def _quality_advice(steps: Collection[str], value_passes: bool) -> str:
    found = [text for family, text in LOSE_LESS.items() if any(step.startswith(family) for step in steps)]
    advice = "; ".join(filter(None, (", ".join(found), "a larger max_drop accepts the loss")))
    return f"{advice}; without --strict the value is judged, which passes" if value_passes else advice


def _deciding(difference: Difference, result: Score, limit: float) -> str:
    """Say, where the interval holds the limit, how many samples it would take until it does not."""
    _, low, high = difference.loss
    if not low <= limit < high:
        return ""
    if decide := deciding(difference, len(result.samples), limit):
        return f"the interval holds the limit: about {decide:,} samples decide"
    return f"the interval holds the limit, and even {MOST_SAMPLES:,} samples would not decide"


def deciding(difference: Difference, samples: int, limit: float) -> int:
    """Return how many samples it takes until the interval does not hold the limit, 0 where more than anybody has.

    Args:
        difference: gives the interval of the loss by the number of samples.
        samples: so many do not decide.
        limit: the loss that is allowed.
    """

    def open_at(samples: int) -> bool:
        low, high = difference.loss_at(samples)
        return low <= limit < high

    enough = samples
    while open_at(enough):
        enough *= 2
        if enough > MOST_SAMPLES:
            return 0
    return bisect.bisect_left(range(enough), True, enough // 2, key=lambda samples: not open_at(samples))


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


def faster(batch: int, name: str, speeds: Speeds, stages: Sequence[Stage], device: str = "cpu") -> Gate:
    """Judge the promise of speed at one batch size: the whole interval above 0.97, beside an A/A control.

    An interval that holds 0.97 is undecided, which is no pass.

    Args:
        batch: the batch size.
        name: of the result in `speeds`.
        speeds: of the result and the trained model, its baseline.
        stages: the trained model and every step's result, which say what it was that slowed it down.
        device: where it was timed.
    """
    ratios, control = speeds.ratios(name, speeds.baseline), speeds.control()[batch]
    ratio, verdict = ratios[batch], ratios[batch].verdict(SLOWER)
    slower = [str(other) for other, found in ratios.items() if found.verdict(SLOWER) == "slower"]
    # The 3 % that are not worth a refusal are no gain either.
    no_faster = " (no faster, and no more than 3 % slower)" if ratio.low > SLOWER and ratio.high < 1 else ""
    if control.senseless:
        advice = f"{_busy(speeds, batch)}, so that the same file counts as slower or faster than itself; "
        advice += f"{_quiet(speeds)}; {QUIETER}"
    elif verdict == "undecided" and slower:
        advice = f"undecided, and not measured for longer, since it is slower at batch {', '.join(slower)}"
    elif verdict == "undecided":
        advice = f"undecided: {_busy(speeds, batch)}; {_longer(name, speeds, batch)}; {QUIETER}"
    else:
        advice = explain.slower(stages, batch, device) if verdict == "slower" else ""
    return Gate(
        f"promise: faster at batch {batch}",
        verdict == "not slower" and not control.senseless,
        f"{ratio}{no_faster}, the trained model against itself {control}",
        f"interval above {SLOWER}×",
        advice,
        machine=control.senseless,
        undecided=verdict == "undecided",
    )


QUIETER = "run it again when nothing else runs here: the steps are kept and only measured again"


def _busy(speeds: Speeds, batch: int) -> str:
    control = speeds.control()[batch]
    calm = control.high <= CLEAR * control.low and not control.senseless
    why = f"its speed is too near {SLOWER}× to tell" if calm else "the machine is too busy"
    least, most = control.spread
    return f"{why}: A/A spread {least:.2g} to {most:.2g} in {speeds.rounds} rounds"


def _quiet(speeds: Speeds) -> str:
    return f"a quiet machine takes about {speeds.took / max(speeds.rounds, 1) * FEWEST:,.0f} s"


def _longer(name: str, speeds: Speeds, batch: int) -> str:
    """Return how long it would take until the ratio is decided, on a quiet machine and on this one as it is."""
    more = more_seconds(speeds.ratios(name, speeds.baseline)[batch], speeds, SLOWER)
    end = f"about {max(more, 1):,.0f} s more" if more < 36_000 else f"no end is in sight so near to {SLOWER}×"
    return f"{_quiet(speeds)}, here {end} (--patience)"


def parity(lane: Mapping[str, Any]) -> Gate:
    """Judge a lane of `optimize.judge.parity`; nothing compared is no parity, and neither is NaN."""
    passed = lane["requests"] > 0 and lane["mismatched"] == 0 and lane["max_abs_diff"] <= lane["tolerance"]
    return Gate(
        f"parity: {lane['lane']}",
        passed,
        f"{lane['mismatched']} of {lane['requests']} differ, largest difference {lane['max_abs_diff']:.2g}",
        f"≤ {lane['tolerance']:.2g}",
        "" if passed else "the server runs other bytes, another runtime or other inputs: compare its logs",
    )


def load(budget: Budget, report: dict[str, Any]) -> list[Gate]:
    """Judge the load test: valid, nothing failed, and the 99th percentile when the budget names it.

    A percentile is judged as `loadtest run --threshold` does: of too few requests it is undecided, which is no pass.
    """
    requests = report["requests"]
    wrong = requests["failed"] + requests["dropped"] + requests["mismatched"]
    answered = report["valid"] is True and requests["done"] > 0 and wrong == 0
    busy = wrong == 0 and report["fault"] == validity.CLIENT
    advice = _no_time(report) if busy else report["why"] or "see the load report and the server's log"
    gates = [
        Gate(
            "load: answered",
            answered,
            f"{requests['done']:,} answered, {wrong} not" + ("" if report["valid"] else ", run invalid"),
            "valid, all answered",
            "" if answered else advice,
            machine=busy,
        )
    ]
    for verdict in thresholds.judge(report, sentences(budget)):
        measured = "none answered" if math.isnan(verdict["measured"]) else f"{verdict['measured']:.1f} ms"
        advice = "" if verdict["passed"] else _p99_advice(verdict, answered)
        limit, undecided = f"≤ {budget.p99_ms:g} ms", verdict["undecided"]
        gates.append(Gate("load: p99", verdict["passed"], measured, limit, advice, busy, undecided))
    return gates


def sentences(budget: Budget) -> tuple[str, ...]:
    """Return the thresholds of the load test that the budget names."""
    return () if budget.p99_ms is None else (f"p99 <= {budget.p99_ms:.12g}ms",)


def _no_time(report: dict[str, Any]) -> str:
    plan = report["plan"]
    lower = "" if plan["rate"] is None else ", or a lower rate in [load]"
    return f"the machine is too busy: {report['why']}; it takes {plan['duration']:g} quiet s{lower}; {QUIETER}"


def _p99_advice(verdict: dict[str, Any], answered: bool) -> str:
    if verdict["undecided"]:
        return f"undecided: {verdict['why']} (duration in [load])"
    return "lower the load, prune more, or give the target more cores" if answered else "see load: answered"


def stop(gates: Sequence[Gate], where: str, instead: str = "") -> None:
    """Raise when a gate did not pass.

    Args:
        gates: what was judged.
        where: the folder of what was judged.
        instead: what may pass in its place, an option of the command; empty where nothing is known to.

    Raises:
        GateRefused: with every gate that said no in one line each.
        BusyMachine: the same, where it was the machine alone that did not let a gate judge.
    """
    refused = [gate for gate in gates if not gate.passed]
    lines = [f"{gate.name}: {gate.measured}, wanted {gate.limit}; {gate.advice}" for gate in refused]
    if refused and all(gate.machine for gate in refused):
        raise BusyMachine("; ".join(lines), where=where, fix=QUIETER)
    if refused:
        others = "change the recipe as advised, or publish with --force"
        raise GateRefused("; ".join(lines), where=where, fix=f"{instead}, or {others}" if instead else others)
