"""Validity: whether a run measured the server under the planned load, or something else.

A run that is not valid passes no threshold, is no baseline, and ends a command with exit code 3.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from loadtest.record.results import MISMATCH, Results

LARGEST_LAG_MS = 1.0
LARGEST_LAG_SHARE = 0.1
LARGEST_LAG_GAP = 0.01
"""Share of the mean time between two requests that one may leave late; where they are far apart, it is hardly off."""
LARGEST_OWN_SHARE = 0.75
"""Share of a latency that the client's own lag at the same percentile may reach; beyond it, it measures the client.

A client that shares two cores with a server stays well below with few requests in flight, and comes near with sixteen;
one whose core three others use comes above.
"""
BUSIEST_CLIENT = 0.8
MOST_FAILED = 0.01
"""Share of the requests that may fail where no threshold speaks of errors."""
FULL_TIMES = 10.0
"""How many times as long as the client itself was ever late a backlog must be full to be the server's."""
STALL_SECONDS, STALL_TIMES = 1.0, 10.0
"""A closed loop without any answer for longer than both, the second in median latencies, stood still."""


CUT = "closed before the answer"
"""What every sender says of a connection that ended while a request was on its way."""
GONE, CLIENT = "gone", "client"
"""Whose fault it is, where that decides what a command does: the server went away, or the client was too busy."""


class Invalid(NamedTuple):
    """Why a run proves nothing, what to do about it, and whose fault it is: `GONE`, `CLIENT`, or empty."""

    why: str
    fix: str
    fault: str = ""


def why_invalid(values: dict[str, Any], results: Results, asked: Collection[str] = (), limited: bool = True) -> Invalid:
    """Return why the run proves nothing, or empty texts; the first reason is the root of the others.

    Args:
        values: the run's document, its figures filled in.
        results: the run.
        asked: percentiles that a threshold speaks of, as keys of `latency_ms`; that of 99 % is always judged.
        limited: whether no more than `MOST_FAILED` of the requests may fail; not where a threshold says how many may.
    """
    requests, end = values["requests"], results.end
    if end is None:
        return Invalid("the run was interrupted; the figures are those of the part before", "let it run to its end")
    if end.get("gone"):
        why = f"the server stopped answering; the run ended early, after {end['end']:.1f} s"
        return Invalid(why, "look into the server's log", GONE)
    most = f": {end['errors'][0]['text']}" if end.get("errors") else ""
    if requests["mismatched"]:
        wrong = next((error["text"] for error in end["errors"] if error["verdict"] == MISMATCH), "")
        why = f"{requests['mismatched']} answers under load were wrong: {wrong}"
        return Invalid(why, "find the cause, or allow the difference with --tolerance if the metric does")
    if not requests["done"]:
        why = f"not one of {requests['planned']} requests succeeded{most}"
        return Invalid(why, "look into the server's log, or send less")
    if limited and not requests["failed"] <= MOST_FAILED * requests["planned"]:
        share = requests["failed"] / requests["planned"]
        why = f"{requests['failed']:,} of {requests['planned']:,} requests failed ({share:.1%}){most}"
        again = "send again what a gateway cuts off with --retries 2, " if CUT in most else ""
        fix = f'look into the server\'s log, {again}or say how many may fail: --threshold "errors < {2 * share:.0%}"'
        return Invalid(why, fix)
    return _not_the_planned_load(values, results.open) or _client(values, results.open, asked) or Invalid("", "")


def largest_lag(values: dict[str, Any]) -> float:
    """Return the milliseconds that an open loop's requests may leave late."""
    own = np.fmax(LARGEST_LAG_MS, LARGEST_LAG_SHARE * values["latency_ms"]["p50"])
    offered = values["rate"]["offered"]
    return float(np.fmax(own, LARGEST_LAG_GAP * 1e3 / offered if offered else 0.0))


def full_backlog(values: dict[str, Any]) -> str:
    """Return how the server left no room for more requests in flight; empty where there was, or the client was late.

    A client that was held up sends all that was due meanwhile at once, which fills the backlog for a moment too.
    """
    backlog, late = values.get("backlog"), values["loop_lag_ms"].get("max") or 0.0
    if not backlog or not backlog["full"] > FULL_TIMES * late / 1e3:
        return ""
    plan = values["plan"]
    asked = plan["in_flight"] * (1 if plan.get("index") is not None else plan["workers"])
    why = "" if backlog["most"] >= asked else f"; {asked:,} were planned, the limit of open files allows no more"
    return f"its backlog was full for {backlog['full']:.1f} s: {backlog['most']:,} requests in flight{why}"


def _not_the_planned_load(values: dict[str, Any], open_loop: bool) -> Invalid | None:
    if not open_loop:
        return _stall(values)
    limit, lag = largest_lag(values), values["lag_ms"]["p99"]
    if lag <= limit:
        return None
    if full := full_backlog(values):
        why = f"the server was slower than the load, {full}; so requests left late, the load was not the planned one"
        return Invalid(why, "use a lower rate, or allow more at once with --in-flight, --workers and `ulimit -n`")
    why = f"requests left late: lag p99 is {lag:.2f} ms, {limit:.2f} ms are allowed; the load was not the planned one"
    return Invalid(why, "use a lower rate, or a client machine that has nothing else to do", CLIENT)


def _stall(values: dict[str, Any]) -> Invalid | None:
    gap, usual = values["longest_gap"], values["latency_ms"]["p50"] / 1e3 + values["plan"].get("think", 0.0)
    if gap["seconds"] <= max(STALL_SECONDS, STALL_TIMES * usual):
        return None
    why = f"the server stood still: no answer for {gap['seconds']:.1f} s from second {gap['at']:.1f} on; "
    why += "a closed loop sends nothing meanwhile, so that its latencies hardly show it"
    return Invalid(why, "look into the server's log; measure with --rate, where every planned request counts")


def _client(values: dict[str, Any], open_loop: bool, asked: Collection[str]) -> Invalid | None:
    cores = values["client_cores"]
    used = values["client_cpu"] / cores
    if not open_loop and used > BUSIEST_CLIENT:
        own = "its core" if cores == 1 else f"its {cores} cores"
        why = f"the client was the limit: it used {used:.0%} of {own}, {BUSIEST_CLIENT:.0%} are allowed"
        return Invalid(
            why, "use more --workers, a larger batch or less concurrency; HTTP costs the client less than gRPC"
        )
    for key in ("p99", *sorted(set(asked) & {"p999", "max"}, reverse=True)):
        if why := _late(values, key):
            return Invalid(why, "use a client machine that has nothing else to do, or more --workers", CLIENT)
    return None


def _late(values: dict[str, Any], key: str) -> str:
    """Return why a percentile is in good part the client's own; empty where it is the server's."""
    lags = [values[group].get(key) for group in ("lag_ms", "loop_lag_ms")]
    lag = max((one for one in lags if one is not None and one == one), default=0.0)
    limit = float(np.fmax(LARGEST_LAG_MS, LARGEST_OWN_SHARE * values["latency_ms"][key]))
    if lag <= limit:
        return ""
    name = {"p999": "p99.9"}.get(key, key)
    return (
        f"the client was late itself: its lag {name} is {lag:.2f} ms, {limit:.2f} ms are allowed beside the latency's"
    )
