"""Breakdown: the figures of a run apart: by model, by kind of failure, by what the server spent its time on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.record.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, Results
from loadtest.record.statistics import Seconds, milliseconds

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


def by_model(results: Results, seconds: float) -> list[dict[str, Any]]:
    """Return for each part of the traffic its counts, its rate of right answers and its latency.

    Args:
        results: the run.
        seconds: during which it sent.
    """
    rows, first = [], 0
    counted, done, failed = results.of(OK, MISMATCH, TIMEOUT), results.of(OK), results.of(ERROR, TIMEOUT)
    latency = results.done - results.planned
    for part in results.header["parts"]:
        own = (results.payload >= first) & (results.payload < first + part["payloads"])
        first += part["payloads"]
        rows.append(
            {
                "model": part["model"],
                "version": part["version"],
                "planned": int(own.sum()),
                "done": int((own & done).sum()),
                "failed": int((own & failed).sum()),
                "rate": float((own & done & (results.done <= seconds)).sum()) / seconds,
                "latency_ms": milliseconds(latency[own & counted]),
            }
        )
    return rows


def failures(results: Results) -> list[tuple[str, Seconds]]:
    """Return when requests failed, by the short name of what went wrong, the most frequent first.

    Those that were not sent are among them, at the seconds at which they were due.
    """
    bad = ~results.of(OK) & ~np.isnan(results.done)
    found = [(name, results.done[bad & (results.kind == number)]) for number, name in enumerate(results.kinds)]
    found.append(("not sent", results.planned[results.of(DROPPED)]))
    named = [(name or "failed", moments) for name, moments in found if len(moments)]
    return sorted(named, key=lambda one: -len(one[1]))


def column(results: Results, key: str) -> tuple[Seconds, NDArray[np.float64]]:
    """Return one value of the readings and the seconds at which it was read; both empty where nobody read it."""
    rows = [row for row in results.readings if key in row]
    return np.array([row["reading"] for row in rows], float), np.array([row[key] for row in rows], float)


def stages(results: Results) -> dict[str, NDArray[np.float64]] | None:
    """Return how the mean request's milliseconds were spent between two readings of the server's metrics.

    Returns:
        `at` (seconds, the middle of the time between) and for each stage milliseconds per request: those of `STAGES`,
        `other` (the server's own, beyond these) and `network` (what our requests took longer than the server's).
        None where the metrics were not read often enough.
    """
    rows = [row for row in results.readings if "success" in row]
    counts = np.diff([row["success"] for row in rows])
    if not (counts > 0).any():
        return None
    edges = np.array([row["reading"] for row in rows])
    each = {key: np.diff([row.get(f"{key}_s", np.nan) for row in rows]) for key in (*STAGES, "request")}
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = {key: np.where(counts > 0, seconds / counts * 1e3, np.nan) for key, seconds in each.items()}
    ours = _mean_service(results, edges)
    spent = {key: mean[key] for key in STAGES}
    other = np.fmax(mean["request"] - np.sum(list(spent.values()), axis=0), 0.0)
    network = np.fmax(ours - mean["request"], 0.0)
    return {"at": (edges[1:] + edges[:-1]) / 2, **spent, "other": other, "network": network}


def _mean_service(results: Results, edges: Seconds) -> NDArray[np.float64]:
    """Return the mean milliseconds from sending to answer of the requests answered between the edges."""
    answered = results.of(OK, MISMATCH) & ~np.isnan(results.sent)
    done = results.done[answered]
    sums, _ = np.histogram(done, edges, weights=done - results.sent[answered])
    counts, _ = np.histogram(done, edges)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, sums / counts * 1e3, np.nan)
