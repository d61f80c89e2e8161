"""Validity: whether a run measured the server under the planned load, or something else."""

from typing import Any

import numpy as np

from loadtest.results import MISMATCH, Results

LARGEST_LAG_MS = 1.0
LARGEST_LAG_SHARE = 0.1
BUSIEST_CLIENT = 0.8


def why_invalid(values: dict[str, Any], results: Results) -> tuple[str, str]:
    """Return why the run proves nothing and what to do, or empty texts; the first reason is the root of the others."""
    requests, end = values["requests"], results.end
    if end is None:
        return "the run was interrupted; the figures are those of the part before", "let it run to its end"
    if end.get("gone"):
        return (
            f"the server stopped answering; the run ended early, after {end['end']:.1f} s",
            "look into the server's log",
        )
    if requests["mismatched"]:
        most = next((error["text"] for error in end["errors"] if error["verdict"] == MISMATCH), "")
        why = f"{requests['mismatched']} answers under load were wrong: {most}"
        return why, "find the cause, or allow the difference with --tolerance if the metric does"
    if not requests["done"]:
        most = f": {end['errors'][0]['text']}" if end.get("errors") else ""
        return f"not one of {requests['planned']} requests succeeded{most}", "look into the server's log, or send less"
    return _why_not_the_planned_load(values) if results.open else _why_not_the_server(values)


def largest_lag(values: dict[str, Any]) -> float:
    """Return the milliseconds that an open loop's requests may leave late."""
    return float(np.fmax(LARGEST_LAG_MS, LARGEST_LAG_SHARE * values["latency_ms"]["p50"]))


def _why_not_the_planned_load(values: dict[str, Any]) -> tuple[str, str]:
    limit, lag = largest_lag(values), values["lag_ms"]["p99"]
    if lag <= limit:
        return "", ""
    why = f"requests left late: lag p99 is {lag:.2f} ms, {limit:.2f} ms are allowed; the load was not the planned one"
    return why, "use a lower rate, or a client machine that has nothing else to do"


def _why_not_the_server(values: dict[str, Any]) -> tuple[str, str]:
    cores = values["client_cores"]
    used = (values["client_cpu"] or 0.0) / cores
    if used <= BUSIEST_CLIENT:
        return "", ""
    own = "its core" if cores == 1 else f"its {cores} cores"
    why = f"the client was the limit: it used {used:.0%} of {own}, {BUSIEST_CLIENT:.0%} are allowed"
    return why, "use more --workers, a larger batch or less concurrency; HTTP costs the client less than gRPC"
