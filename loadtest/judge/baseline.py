"""Baseline: what a later comparison needs of a run, in a small file that can be kept beside the code.

It holds the report of the run and, for each of `BLOCKS` stretches of time, the counts and a histogram of the latencies:
some ten kilobytes, however many requests there were.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.judge.summary import sending_time, summary
from loadtest.plan.plan import Plan
from loadtest.record import results
from loadtest.record.results import ERROR, MISMATCH, OK, TIMEOUT, Results
from modelathe import files
from modelathe.commandline import document, finite
from modelathe.errors import BadInput

BLOCKS = 60
BIN = 0.005
"""Width of a bin of the histogram, in the logarithm of the latency: half a percent."""

_FASTEST_MS = 1e-4
# These say where, how long and by what means a load was sent, not which.
_NOT_THE_LOAD = {"url", "duration", "seed", "timeout", "warmup", "requests", "in_flight", "workers"}
_NOT_THE_LOAD |= {"metrics", "ray", "index", "begin", "thresholds"}
_FILES = {"authority", "certificate", "key"}


@dataclass(frozen=True)
class Baseline:
    """One run, as a comparison sees it; the arrays have one row for each stretch of time, by planned times.

    Args:
        path: the file that it was read from.
        document: the run's report.
        seconds: length of a stretch.
        planned, failed, done: requests, int64 of shape (blocks,); `done` are the right answers, by the time they came.
        bins: logarithms of milliseconds in steps of `BIN`, the lower edges, float64 of shape (bins,).
        latency: requests in each bin, int64 of shape (blocks, bins).
    """

    path: Path
    document: dict[str, Any]
    seconds: float
    planned: NDArray[np.int64]
    failed: NDArray[np.int64]
    done: NDArray[np.int64]
    bins: NDArray[np.float64]
    latency: NDArray[np.int64]

    def load(self) -> dict[str, Any]:
        """Return what two runs must have in common: the models, what is sent to them, and in which shape."""
        kept = planned_load(Plan.from_document(self.document["plan"]))
        for key in ("model", "batch", "shapes", "weight"):
            kept[key] = [part.get(key) for part in self.document["parts"]]
        return kept


def planned_load(plan: Plan) -> dict[str, Any]:
    """Return what two plans must have in common."""
    kept = {key: value for key, value in plan.document().items() if key not in _NOT_THE_LOAD}
    connection = {key: value for key, value in kept["connection"].items() if key not in _FILES}
    return kept | {"protocol": plan.url.partition(":")[0], "connection": connection}


def read(path: Path) -> Baseline:
    """Read a baseline, or make one of a result file.

    Raises:
        BadInput: the file is missing or is neither.
    """
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
            rest = file.read() if _is_baseline(first) else ""
    except FileNotFoundError:
        raise BadInput("there is no such file", where=str(path), fix="give a result file or a baseline") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise BadInput("is neither a result file nor a baseline", where=str(path), fix="give one of them") from error
    try:
        if rest:
            return _from_rows(path, json.loads(first), [json.loads(line) for line in rest.splitlines()])
        return of(results.read(path), path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"is not a whole baseline: {error!r}", where=str(path), fix="save it again") from error


def _is_baseline(first: str) -> bool:
    """Return whether this is the first line of a baseline; that of a result file holds the plan itself."""
    try:
        head = json.loads(first)
    except ValueError:
        return False
    return isinstance(head, dict) and "run" in head and "plan" not in head


def of(run: Results, path: Path) -> Baseline:
    """Return the baseline of a run in memory."""
    seconds = sending_time(run)

    def blocks(times: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.clip(times / seconds * BLOCKS, 0, BLOCKS - 1).astype(np.int64)

    def counts(mask: NDArray[np.bool_], times: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.bincount(blocks(times[mask]), minlength=BLOCKS).astype(np.int64)

    counted = run.of(OK, MISMATCH, TIMEOUT)
    latency = np.maximum((run.done - run.planned)[counted] * 1e3, _FASTEST_MS)
    numbers, inverse = np.unique(np.floor(np.log(latency) / BIN).astype(np.int64), return_inverse=True)
    table = np.zeros((BLOCKS, len(numbers)), np.int64)
    np.add.at(table, (blocks(run.planned[counted]), inverse), 1)
    everything = np.ones(len(run.planned), bool)
    planned, failed = counts(everything, run.planned), counts(run.of(ERROR, TIMEOUT), run.planned)
    done = counts(run.of(OK) & (run.done <= seconds), run.done)
    bins = np.asarray(numbers * BIN, np.float64)
    return Baseline(path, summary(run), seconds / BLOCKS, planned, failed, done, bins, table)


def joined(baseline: Baseline, stretch: NDArray[np.int64]) -> Baseline:
    """Return a baseline with fewer, longer stretches of equal length.

    Args:
        baseline: the run.
        stretch: to which new stretch each of its own belongs, ascending from 0, int64 of shape (blocks,).
    """
    count = int(stretch[-1]) + 1

    def sums(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        table = np.zeros((count, *rows.shape[1:]), np.int64)
        np.add.at(table, stretch, rows)
        return table

    planned, failed, done = map(sums, (baseline.planned, baseline.failed, baseline.done))
    seconds, latency = baseline.seconds * len(stretch) / count, sums(baseline.latency)
    return Baseline(baseline.path, baseline.document, seconds, planned, failed, done, baseline.bins, latency)


def write(baseline: Baseline, path: Path) -> None:
    """Write a baseline: one line for the run, one for each stretch of time."""
    numbers = np.round(baseline.bins / BIN).astype(int).tolist()
    head = document(blocks=len(baseline.planned), seconds=baseline.seconds, run=baseline.document)
    lines = [json.dumps(finite(head))]
    columns = (baseline.planned.tolist(), baseline.failed.tolist(), baseline.done.tolist(), baseline.latency.tolist())
    for planned, failed, done, row in zip(*columns, strict=True):
        kept = {number: count for number, count in zip(numbers, row, strict=True) if count}
        lines.append(json.dumps({"planned": planned, "failed": failed, "done": done, "latency": kept}))
    files.write(path, "\n".join(lines) + "\n")


def _from_rows(path: Path, head: dict[str, Any], rows: list[dict[str, Any]]) -> Baseline:
    if len(rows) != head["blocks"]:
        raise ValueError(f"{len(rows)} of {head['blocks']} lines")
    numbers = sorted({int(number) for row in rows for number in row["latency"]})
    table = np.array([[row["latency"].get(str(number), 0) for number in numbers] for row in rows], np.int64)
    planned, failed, done = (np.array([row[key] for row in rows], np.int64) for key in ("planned", "failed", "done"))
    bins = np.array(numbers, np.float64) * BIN
    return Baseline(path, head["run"], head["seconds"], planned, failed, done, bins, table.reshape(len(rows), -1))
