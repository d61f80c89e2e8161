"""Compare: whether one run, or several, was faster than another, and how sure that is.

The effect is the ratio B / A of a figure; for errors it is the difference of their shares. The 95 % interval of it is
drawn for each side by itself:

- One run on a side: a block bootstrap. Neighbouring latencies are not independent, one busy moment makes many slow
  requests, so whole stretches of time are drawn again instead of single requests (Carlstein, "The use of subseries
  values for estimating the variance of a general statistic from a stationary sequence", Annals of Statistics 14, 1986;
  Kuensch, "The jackknife and the bootstrap for general stationary observations", Annals of Statistics 17, 1989). It
  knows nothing of what differs between runs.
- Several runs on a side: Student's distribution over the runs, which are independent (Georges, Buytaert, Eeckhout,
  "Statistically rigorous Java performance evaluation", OOPSLA 2007).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import special

from loadtest import baseline
from loadtest.baseline import BIN, Baseline
from loadtest.commandline import document
from loadtest.errors import BadInput, LatheError, Refused
from loadtest.plan import Plan
from loadtest.report import number

Numbers = NDArray[np.float64]
LEVEL = 95.0
METRICS = ("throughput", "p50", "p90", "p99", "errors")
UNITS = {"throughput": "/s", "p50": "ms", "p90": "ms", "p99": "ms", "errors": "%"}
NONE_SHOWN = "no difference shown"
_WORDS = {"throughput": ("slower", "faster"), "errors": ("fewer", "more")}
_DRAWS = 4000


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


def save(path: Path, destination: Path) -> None:
    """Save the baseline of the run in a result file.

    Raises:
        Refused: the run is invalid.
    """
    run = baseline.read(path)
    if not run.document["valid"]:
        why = f"an invalid run makes no baseline: {run.document['why']}"
        raise Refused(why, where=str(path), fix=run.document["fix"])
    baseline.write(run, destination)


def compare(a: Sequence[Baseline], b: Sequence[Baseline], allow: float | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the JSON document of a comparison.

    Args:
        a: the runs to compare with.
        b: the runs in question.
        allow: fails a metric that is shown to be worse by more than this share; errors fail when they are shown to be
            more. None fails nothing.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    metrics = {name: _metric(name, a, b, allow, rng) for name in METRICS}
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


def refusal(values: dict[str, Any]) -> LatheError | None:
    """Return the failure that a comparison deserves; None where it passed."""
    invalid = [run for side in ("a", "b") for run in values[side] if not run["valid"]]
    if invalid:
        return Refused(
            f"an invalid run proves nothing: {invalid[0]['why']}", where=invalid[0]["file"], fix="run it again"
        )
    worse = [name for name, metric in values["metrics"].items() if not metric["passed"]]
    if not worse:
        return None
    lines = "".join(f"\n  {line(name, values['metrics'][name])}" for name in worse)
    return Refused(f"worse by more than {values['allow']:.1%}{lines}", fix="find the cause, or save a new baseline")


def line(name: str, metric: dict[str, Any]) -> str:
    """Return a metric of a comparison as a line of text."""
    return f"{name}: {_effect(name, metric)}, {metric['verdict']}"


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
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for metric, (*cells, verdict) in zip(values["metrics"].values(), rows(values), strict=True):
        style = "" if verdict == NONE_SHOWN else "green" if _better(metric) else "red"
        table.add_row(*cells, Text(verdict, style))
    sides = [Text(f"{side.upper()}: {', '.join(run['file'] for run in values[side])}") for side in ("a", "b")]
    notes = [Text(f"note: {note}", style="yellow") for note in values["notes"]]
    return Group(*sides, Text(), table, *notes)


def _better(metric: dict[str, Any]) -> bool:
    return metric["verdict"] in ("faster", "fewer")


def _metric(
    name: str, a: Sequence[Baseline], b: Sequence[Baseline], allow: float | None, rng: np.random.Generator
) -> dict[str, Any]:
    (at, drawn), (other, others) = _side(name, a, rng), _side(name, b, rng)
    change = others - drawn
    known = not np.isnan(change).any()
    low, high = np.percentile(change, [50 - LEVEL / 2, 50 + LEVEL / 2]) if known else (np.nan, np.nan)
    verdict = NONE_SHOWN
    if low > 0 or high < 0:
        verdict = _WORDS.get(name, ("faster", "slower"))[int(low > 0)]
    worse, margin = -high if name == "throughput" else low, 0.0
    if allow is not None and name != "errors":
        margin = -np.log1p(-allow) if name == "throughput" else np.log1p(allow)
    values = {"a": at, "b": other, "effect": other - at, "low": low, "high": high}
    if name != "errors":
        values = {key: float(np.exp(value)) for key, value in values.items()}
    return {**values, "unit": UNITS[name], "verdict": verdict, "passed": allow is None or not worse > margin}


def _side(name: str, runs: Sequence[Baseline], rng: np.random.Generator) -> tuple[float, Numbers]:
    """Return a figure of one side and draws from what it might have been; logarithms, but for errors."""
    scale: Callable[[Numbers], Numbers] = (lambda values: values) if name == "errors" else _log
    if len(runs) == 1:
        blocks = len(runs[0].planned)
        drawn = rng.multinomial(blocks, np.full(blocks, 1 / blocks), _DRAWS)
        values = scale(_figure(name, runs[0], np.vstack([np.ones(blocks, np.int64), drawn])))
        return float(values[0]), values[0] + (values[1:] - values[0]) * _expansion(blocks)
    values = scale(np.array([_figure(name, run, np.ones((1, len(run.planned)), np.int64))[0] for run in runs]))
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), mean + error * rng.standard_t(len(values) - 1, _DRAWS)


def _expansion(blocks: int) -> float:
    """Return by how much to widen what was drawn from so few stretches (Hesterberg, arXiv 1411.5279, 5.3)."""
    tail = 0.5 + LEVEL / 200
    return float(special.stdtrit(blocks - 1, tail) / special.ndtri(tail) * np.sqrt(blocks / (blocks - 1)))


def _log(values: Numbers) -> Numbers:
    with np.errstate(divide="ignore"):
        logs = np.log(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _figure(name: str, run: Baseline, weights: NDArray[np.int64]) -> Numbers:
    """Return a metric of a run whose stretches count as often as each row of `weights` says."""
    if name == "throughput":
        return np.asarray(weights @ run.done / (weights.sum(axis=1) * run.seconds))
    if name == "errors":
        with np.errstate(invalid="ignore"):
            return np.asarray(100.0 * (weights @ run.failed) / (weights @ run.planned))
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
