"""Compare: whether one run, or several, was faster than another, and how sure that is.

The effect is the ratio B / A of a figure; for errors it is the difference of their shares. The 95 % interval of it is
drawn for each side by itself:

- One run on each side: a block bootstrap. Neighbouring latencies are not independent, one busy moment makes many slow
  requests, so whole stretches of time are drawn again instead of single requests (Carlstein, "The use of subseries
  values for estimating the variance of a general statistic from a stationary sequence", Annals of Statistics 14, 1986;
  Kuensch, "The jackknife and the bootstrap for general stationary observations", Annals of Statistics 17, 1989). Each
  draw takes the same stretches of both runs, so that a profile which both follow is no difference between them. The
  stretches are 2.5 times as long as the difference of the runs remembers itself (`loadtest.judge.stretches`). Where too
  few fit into the runs, or one or two hold most of the difference, the interval is not to be trusted: the verdict is
  undecided. It knows nothing of what differs between runs.
- Several runs on a side: Student's distribution over the runs, which are independent (Georges, Buytaert, Eeckhout,
  "Statistically rigorous Java performance evaluation", OOPSLA 2007).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text
from scipy import special

from loadtest.judge import baseline, stretches
from loadtest.judge.baseline import BIN, Baseline
from loadtest.judge.stretches import Cut
from loadtest.plan.plan import Plan
from loadtest.record.statistics import number
from loadtest.record.table import NONE, table
from modelathe.commandline import document
from modelathe.errors import BadInput, ModelatheError, Refused

Numbers = NDArray[np.float64]
LEVEL = 95.0
LATENCIES = ("p50", "p90", "p99")
METRICS = ("throughput", *LATENCIES, "errors")
UNITS = {"throughput": "/s", "p50": "ms", "p90": "ms", "p99": "ms", "errors": "%"}
NONE_SHOWN = "no difference shown"
UNDECIDED = "undecided"
NOTHING = "nothing to compare"
_WORDS = {"throughput": ("slower", "faster"), "errors": ("fewer", "more")}
_DRAWS = 2000


def read_side(path: Path) -> list[Baseline]:
    """Return the runs of one side: a result file, a baseline, or all of them in a folder.

    Raises:
        BadInput: a file that is neither, or an empty folder.
    """
    if not path.is_dir():
        return [baseline.read(path)]
    found = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
    if not found:
        raise BadInput("has no result file (.jsonl) and no baseline (.json)", where=str(path), fix="give a run's file")
    return [baseline.read(file) for file in found]


def with_run(before: Sequence[Baseline], path: Path, allow: float | None) -> dict[str, Any]:
    """Return the comparison of the run in a result file with the runs before it.

    Raises:
        BadInput: it did not have their load.
    """
    now = [baseline.read(path)]
    check(before, now)
    return compare(before, now, allow)


def compare(a: Sequence[Baseline], b: Sequence[Baseline], allow: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the JSON document of a comparison.

    Args:
        a: the runs to compare with.
        b: the runs in question.
        allow: fails a metric that is shown to be worse by more than this share; errors fail when they are shown to be
            more. A metric that is undecided fails when it was measured to be worse by more. None fails nothing but a
            comparison in which a side has no figure.
        seed: of the draws.
    """
    metrics = {name: _metric(name, a, b, allow, seed) for name in METRICS}
    return document(
        passed=all(metric["passed"] for metric in metrics.values()) and all(run.document["valid"] for run in (*a, *b)),
        allow=allow,
        a=[_run(run) for run in a],
        b=[_run(run) for run in b],
        metrics=metrics,
        notes=_notes(a, b),
    )


def _run(run: Baseline) -> dict[str, Any]:
    return {"file": str(run.path), **{key: run.document[key] for key in ("valid", "why", "model", "version")}}


def _notes(a: Sequence[Baseline], b: Sequence[Baseline]) -> list[str]:
    notes = [f"{run.path} is an INVALID RUN: {run.document['why']}" for run in (*a, *b) if not run.document["valid"]]
    notes += [f"not the same load: {difference}" for difference in differences(a, b)]
    if min(len(a), len(b)) == 1:
        notes.append("one run on a side: the intervals know nothing of what differs between runs")
    return notes


def differences(a: Sequence[Baseline], b: Sequence[Baseline]) -> list[str]:
    """Return in what the loads of the runs differ from the first one's, in words."""
    first, found = a[0].load(), dict[str, None]()
    for run in (*a[1:], *b):
        load = run.load()
        for key in first:
            if load[key] != first[key]:
                found[f"{key} is {first[key]} in {a[0].path} and {load[key]} in {run.path}"] = None
    return list(found)


def check(a: Sequence[Baseline], b: Sequence[Baseline]) -> None:
    """Refuse to compare what cannot be compared.

    Raises:
        BadInput: the runs sent something else, to another model, or in another way.
    """
    if found := differences(a, b):
        raise _other_load(found)


def check_plan(before: Sequence[Baseline], plan: Plan) -> None:
    """Refuse to send a load that could not be compared with the runs before it.

    Raises:
        BadInput: it is planned in another way than theirs.
    """
    theirs, where = before[0].load(), before[0].path
    load = baseline.planned_load(plan)
    if found := [f"{key} is {theirs[key]} in {where} and {load[key]} here" for key in load if load[key] != theirs[key]]:
        raise _other_load(found)


def _other_load(found: Sequence[str]) -> BadInput:
    return BadInput(
        f"the runs did not have the same load: {'; '.join(found)}",
        fix="compare runs of one load; `loadtest compare --anyway` compares others, if you know what it means",
    )


def refusal(values: dict[str, Any]) -> ModelatheError | None:
    """Return the failure that a comparison deserves; None where it passed."""
    invalid = [run for side in ("a", "b") for run in values[side] if not run["valid"]]
    if invalid:
        return Refused(
            f"an invalid run proves nothing: {invalid[0]['why']}", where=invalid[0]["file"], fix="run it again"
        )
    metrics = values["metrics"]
    if nothing := [name for name, metric in metrics.items() if metric["verdict"] == NOTHING]:
        figures = "; ".join(f"{name}: {metrics[name]['why']}" for name in nothing)
        return Refused(f"{NOTHING}: {figures}", fix="compare runs in which requests were answered")
    worse = [name for name, metric in metrics.items() if not metric["passed"]]
    if not worse:
        return None
    lines = "".join(f"\n  {line(name, values['metrics'][name])}" for name in worse)
    if all(metrics[name]["verdict"] == UNDECIDED for name in worse):
        why = f"measured to be worse by more than {values['allow']:.1%}, but undecided{lines}"
        return Refused(why, fix="run longer, or several times and compare folders of runs")
    return Refused(f"worse by more than {values['allow']:.1%}{lines}", fix="find the cause, or save a new baseline")


def line(name: str, metric: dict[str, Any]) -> str:
    """Return a metric of a comparison as a line of text."""
    why = f": {metric['why']}" if metric["why"] else ""
    return f"{name}: {_effect(name, metric)}, {metric['verdict']}{why}"


def _effect(name: str, metric: dict[str, Any]) -> str:
    if name == "errors":
        return f"{metric['effect']:+.3g} points ({metric['low']:+.3g} to {metric['high']:+.3g})"
    return f"x {metric['effect']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


COLUMNS = ("", "A", "B", "B / A (95 %)", "verdict")


def rows(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a comparison's metrics as the cells of a table below `COLUMNS`."""
    return [
        (f"{name} {metric['unit']}", number(metric["a"]), number(metric["b"]), _effect(name, metric), metric["verdict"])
        for name, metric in values["metrics"].items()
    ]


def text(values: dict[str, Any]) -> RenderableType:
    """Return a comparison for a terminal of 60 columns or more."""
    shown = table(*COLUMNS, figures=NONE)
    for metric, (*cells, verdict) in zip(values["metrics"].values(), rows(values), strict=True):
        style = "" if verdict == NONE_SHOWN else "green" if _better(metric) else "red"
        shown.add_row(*cells, Text(verdict, style))
    sides = [Text(f"{side.upper()}: {', '.join(run['file'] for run in values[side])}") for side in ("a", "b")]
    notes = [Text(f"note: {note}", style="yellow") for note in values["notes"]]
    return Group(*sides, Text(), shown, *notes)


def _better(metric: dict[str, Any]) -> bool:
    return metric["verdict"] in ("faster", "fewer")


def _metric(name: str, a: Sequence[Baseline], b: Sequence[Baseline], allow: float | None, seed: int) -> dict[str, Any]:
    drawn = (_paired if len(a) == len(b) == 1 else _apart)(name, a, b, np.random.default_rng(seed))
    low, high, why = drawn.low, drawn.high, drawn.why
    effect = drawn.b - drawn.a
    if not np.isfinite(effect):
        verdict, why = NOTHING, f"A has {number(_shown(name, drawn.a))}, B has {number(_shown(name, drawn.b))}"
    elif why or not np.isfinite([low, high]).all():
        verdict = UNDECIDED
    elif low > 0 or high < 0:
        verdict = _WORDS.get(name, ("faster", "slower"))[int(low > 0)]
    else:
        verdict = NONE_SHOWN
    margin = 0.0
    if allow is not None and name != "errors":
        margin = -np.log1p(-allow) if name == "throughput" else np.log1p(allow)
    figures = (effect, low, high) if name != "throughput" else (-effect, -high, -low)
    # What is undecided is judged by the figure itself; but a single error is no finding.
    worse = figures[0] if verdict == UNDECIDED and name != "errors" else figures[1]
    values = {"a": drawn.a, "b": drawn.b, "effect": effect, "low": low, "high": high}
    values = {key: _shown(name, value) for key, value in values.items()}
    passed = verdict != NOTHING and (allow is None or worse <= margin)
    return {**values, "unit": UNITS[name], "verdict": verdict, "why": why, "passed": bool(passed)}


def _shown(name: str, value: float) -> float:
    """Return a figure as people read it; it was a logarithm unless it is a share."""
    return value if name == "errors" else float(np.exp(value))


@dataclass(frozen=True)
class _Drawn:
    """A figure of both sides, the interval of its difference, and why that is not to be trusted; logarithms."""

    a: float
    b: float
    low: float
    high: float
    why: str = ""


def _paired(name: str, a: Sequence[Baseline], b: Sequence[Baseline], rng: np.random.Generator) -> _Drawn:
    """Draw the same stretches of one run on each side again and again."""
    runs = _same_blocks(a[0], b[0])
    at, other = (float(_values(name, run, np.ones((1, len(run.planned)), np.int64))[0]) for run in runs)
    cut = _cut(name, lambda metric: _influence(metric, runs[1]) - _influence(metric, runs[0]))
    run_a, run_b = (baseline.joined(run, cut.place) for run in runs)
    count = len(run_a.planned)
    weights = rng.multinomial(count, np.full(count, 1 / count), _DRAWS)
    change = _values(name, run_b, weights) - _values(name, run_a, weights)
    return _Drawn(at, other, *_interval(other - at + (change - (other - at)) * _expansion(count, cut.freedom)), cut.why)


def _apart(name: str, a: Sequence[Baseline], b: Sequence[Baseline], rng: np.random.Generator) -> _Drawn:
    """Take the runs of a side as the independent witnesses."""
    (at, drawn), (other, others) = _side(name, a, rng), _side(name, b, rng)
    return _Drawn(at, other, *_interval(others - drawn))


def _interval(draws: Numbers) -> tuple[float, float]:
    if not np.isfinite(draws).all():
        return float("nan"), float("nan")
    low, high = np.percentile(draws, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def _side(name: str, runs: Sequence[Baseline], rng: np.random.Generator) -> tuple[float, Numbers]:
    """Return a figure of one side and draws from what it might have been."""
    if len(runs) == 1:
        whole = float(_values(name, runs[0], np.ones((1, len(runs[0].planned)), np.int64))[0])
        cut = _cut(name, lambda metric: _influence(metric, runs[0]))
        run = baseline.joined(runs[0], cut.place)
        count = len(run.planned)
        values = _values(name, run, rng.multinomial(count, np.full(count, 1 / count), _DRAWS))
        drawn = whole + (values - whole) * _expansion(count, cut.freedom)
        return whole, np.where(bool(cut.why), np.nan, drawn)
    values = np.array([_values(name, run, np.ones((1, len(run.planned)), np.int64))[0] for run in runs])
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), mean + error * rng.standard_t(len(values) - 1, _DRAWS)


def _cut(name: str, series: Callable[[str], Numbers]) -> Cut:
    """Return the stretches for a figure, given the series behind each.

    Percentiles come from the same requests: where these depend on each other, one of the series may not show it.
    """
    alike = LATENCIES if name in LATENCIES else (name,)
    return stretches.cut(series(name), max(stretches.memory(series(metric)) for metric in alike))


def _expansion(blocks: int, freedom: float) -> float:
    """Return by how much to widen what was drawn from so few stretches (Hesterberg, arXiv 1411.5279, 5.3)."""
    tail = 0.5 + LEVEL / 200
    return float(special.stdtrit(freedom, tail) / special.ndtri(tail) * np.sqrt(blocks / (blocks - 1)))


def _log(values: Numbers) -> Numbers:
    with np.errstate(divide="ignore"):
        logs = np.log(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _same_blocks(a: Baseline, b: Baseline) -> tuple[Baseline, Baseline]:
    """Return two runs cut into the same number of stretches; a baseline of an older version has fewer."""
    count = int(np.gcd(len(a.planned), len(b.planned)))
    one, other = (baseline.joined(run, np.arange(len(run.planned)) * count // len(run.planned)) for run in (a, b))
    return one, other


def _influence(name: str, run: Baseline) -> Numbers:
    """Return how much each stretch moves a figure of its run, in some unit that two runs of one load share."""
    if name == "throughput":
        moved, base = run.done - run.done.mean(), run.done.mean()
    elif name == "errors":
        moved, base = run.failed - run.failed.sum() / max(run.planned.sum(), 1) * run.planned, run.planned.mean()
    else:
        counts = run.latency.sum(axis=1)
        limit = _quantile(float(name[1:]) / 100, run.latency.sum(axis=0, keepdims=True).astype(np.float64), run.bins)
        beyond = run.latency[:, np.exp(run.bins) > limit].sum(axis=1) if run.latency.size else counts
        moved, base = beyond - beyond.sum() / max(counts.sum(), 1) * counts, counts.mean()
    return np.asarray(moved / base if base else moved, np.float64)


def _values(name: str, run: Baseline, weights: NDArray[np.int64]) -> Numbers:
    """Return `_figure` on the scale on which differences are drawn: logarithms, but for errors."""
    found = _figure(name, run, weights)
    return found if name == "errors" else _log(found)


def _figure(name: str, run: Baseline, weights: NDArray[np.int64]) -> Numbers:
    """Return a metric of a run whose stretches count as often as each row of `weights` says."""
    if name == "throughput":
        return np.asarray(weights @ run.done / (weights.sum(axis=1) * run.seconds))
    if name == "errors":
        # Stretches in which nothing was due have no errors.
        return np.asarray(100.0 * (weights @ run.failed) / np.maximum(weights @ run.planned, 1))
    return _quantile(float(name[1:]) / 100, weights.astype(np.float64) @ run.latency, run.bins)


def _quantile(share: float, counts: Numbers, bins: Numbers) -> Numbers:
    """Return a quantile of each row of a table of histograms, in milliseconds, as if bins were filled evenly."""
    if not counts.size:
        return np.full(len(counts), np.nan)
    below = np.cumsum(counts, axis=1)
    rank = share * below[:, -1]
    place = np.minimum((below < rank[:, None]).sum(axis=1), counts.shape[1] - 1)
    rows = np.arange(len(counts))
    inside = counts[rows, place]
    with np.errstate(divide="ignore", invalid="ignore"):
        part = (rank - (below[rows, place] - inside)) / inside
    return np.asarray(np.exp(bins[place] + BIN * part))
