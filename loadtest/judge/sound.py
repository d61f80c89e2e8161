"""Sound: what an invalid run shows all the same, where it was the client that was late.

A client that is late sends requests late and takes in answers late. A server that answers in order answers a request
that came late no sooner, and later by no more than the largest lateness since it last had nothing to do. So of every
request it is known between what ends the latency lies that a punctual client would have seen, and of every percentile
too, whatever the lateness has to do with the latency. Requests are taken to be alike, so that one which overtook
another took its place. What a client's lateness does to the batches that a server forms is not covered.
"""

import os
from typing import Any

import numpy as np

from loadtest.judge.validity import BUSIEST_CLIENT, CLIENT, largest_lag
from loadtest.record.results import DROPPED, MISMATCH, OK, Results
from loadtest.record.statistics import PERCENTILES, Seconds, number, percentile, ranks

WIDEST = 0.1
"""Share of a percentile that its lower bound may lie below the upper one, and it still counts as sound."""
SLOWER = 0.8
"""Share of a rate that the client was just able to send at which the next run is advised to be."""
_CANDIDATES = 200
"""How many values of lateness are tried for the highest lower bound."""
_FEWEST = 10
"""Requests in a second from which on it is judged whether the client was punctual in it."""


def sound(results: Results, values: dict[str, Any]) -> dict[str, Any] | None:
    """Return what can be said of an invalid run, and how to get the rest; None of a run that is valid or was not ended.

    Args:
        results: the run.
        values: its document, with `valid`, `why` and `fault` filled in.

    Returns:
        `latency_ms`: by percentile, the ends `[low, high]` between which the latency lies that a punctual client would
        have seen, of those percentiles whose ends are at most `WIDEST` apart; `at_most_ms`: the upper end of every
        percentile; both are empty where the client's lateness is not the reason. `punctual`: `seconds` in which the
        client was punctual, `of` how many, and `rate`, the highest that it held in one of them; None of a closed loop.
        `text` and `how`: the same in sentences.
    """
    if values["valid"] or results.end is None or not values["requests"]["done"]:
        return None
    wrong = values["requests"]["failed"] + values["requests"]["mismatched"]
    late = values["fault"] == CLIENT or (not results.open and not wrong and _busy(values))
    found = bounds(results, values["loop_lag_ms"]) if late else {}
    narrow = {key: ends for key, ends in found.items() if ends[0] >= (1 - WIDEST) * ends[1]}
    most = {key: high for key, (_, high) in found.items() if np.isfinite(high)}
    punctual = _punctual(results, values) if results.open else None
    told = {"latency_ms": narrow, "at_most_ms": most, "punctual": punctual}
    return told | {"text": _text(told, values), "how": _how(punctual, values) if late else []}


def bounds(results: Results, loop_lag_ms: dict[str, float | None]) -> dict[str, list[float]]:
    """Return the ends between which each percentile of a punctual client's latencies lies, in milliseconds.

    The upper end is what was measured. For the lower one: a share e of the latencies was lengthened by more than g, so
    the percentile q is at least that of q - e as measured, less g; of all g the one that says most is taken.

    Args:
        results: the run.
        loop_lag_ms: how late answers were taken in: `p99`, `p999` and `max`; None where it was not measured.
    """
    latency, lateness, known = _lengthened(results)
    count, answered = len(latency), results.of(OK, MISMATCH)
    measured = np.sort(np.where(answered, results.done - results.planned, np.inf))
    taken_in = [(share, loop_lag_ms.get(key)) for key, share in (("p99", 0.01), ("p999", 0.001), ("max", 0.0))]
    reading = [(share, lag / 1e3) for share, lag in taken_in if lag is not None] or [(0.0, 0.0)]
    ordered, lags = np.sort(latency), np.unique(np.quantile(lateness, np.linspace(0, 1, _CANDIDATES), method="higher"))
    # Requests without an answer have a latency that nobody knows; the lower end takes each for the shortest.
    unknown = int((~known).sum())
    found = {}
    for key, percent in PERCENTILES.items():
        if key == "max" and unknown:
            continue
        rank, low = int(ranks(count, percent)), 0.0
        for lag in lags:
            beyond = int((lateness[known] > lag).sum()) + unknown
            for share, read in reading:
                at = rank - beyond - int(np.ceil(share * count))
                if at >= 0:
                    low = max(low, float(ordered[at] - lag - read))
        found[key] = [low * 1e3, float(max(ordered[rank], measured[rank])) * 1e3]
    return found


def _lengthened(results: Results) -> tuple[Seconds, Seconds, Any]:
    """Return all latencies, by how much the sending may have lengthened each, and which of them are known.

    A late request holds up those behind it too, until the server has nothing left to do: from then on, nothing that
    came before matters. Where one overtook another, the first to be sent is taken for the first that was due.
    """
    planned, left = results.planned, np.where(np.isnan(results.sent), results.planned, results.sent)
    order = np.argsort(left, kind="stable")
    left, done, known = left[order], results.done[order], results.of(OK, MISMATCH)[order]
    due = np.sort(planned) if results.open else left  # a closed loop plans nothing: only its reading can be late
    ended = np.maximum.accumulate(np.fmax(done, left))
    idle = np.append(True, due[1:] >= ended[:-1])
    lag, period = np.maximum(left - due, 0.0), np.cumsum(idle)
    step = float(lag.max(initial=0.0)) + 1.0
    lengthened = np.maximum.accumulate(lag + period * step) - period * step
    return np.where(known, done - due, np.inf), lengthened, known


def _punctual(results: Results, values: dict[str, Any]) -> dict[str, Any]:
    """Return in how many of the run's seconds the client sent what was due in time, and the highest rate of one."""
    limit, planned = largest_lag(values) / 1e3, results.planned
    left = np.where(results.of(DROPPED) | np.isnan(results.sent), np.inf, results.sent)
    second = planned.astype(np.int64)
    counts = np.bincount(second)
    judged = np.flatnonzero(counts >= _FEWEST)
    kept = [at for at in judged if percentile((left - planned)[second == at], 99) <= limit]
    rate = float(max((counts[at] for at in kept), default=0))
    return {"seconds": len(kept), "of": len(judged), "rate": rate}


def _busy(values: dict[str, Any]) -> bool:
    """Return whether the client used up its own cores."""
    return bool(values["client_cpu"] / values["client_cores"] > BUSIEST_CLIENT)


def _text(told: dict[str, Any], values: dict[str, Any]) -> list[str]:
    lines = []
    if told["latency_ms"]:
        each = ", ".join(f"{_name(key)} {_range(*ends)} ms" for key, ends in told["latency_ms"].items())
        lines.append(f"sound: {each}: what a punctual client would have seen lies between")
    rest = {key: high for key, high in told["at_most_ms"].items() if key not in told["latency_ms"]}
    if rest:
        each = ", ".join(f"{_name(key)} {number(high)} ms" for key, high in rest.items())
        lines.append(f"at most: {each}; the client's lateness is part of it")
    if (punctual := told["punctual"]) and punctual["of"]:
        rate = f", at up to {number(punctual['rate'])} requests/s" if punctual["seconds"] else ""
        lines.append(f"the client was punctual in {punctual['seconds']} of {punctual['of']} seconds{rate}")
    if values["rate"]["achieved"]:
        lines.append(f"the server answered {number(values['rate']['achieved'])} requests/s at least")
    return lines


def _name(key: str) -> str:
    return key.replace("999", "99.9")


def _range(low: float, high: float) -> str:
    return number(high) if number(low) == number(high) else f"{number(low)} to {number(high)}"


def _how(punctual: dict[str, Any] | None, values: dict[str, Any]) -> list[str]:
    """Return what would make the next run a valid one, the likeliest first."""
    found, workers, cores = [], values["plan"]["workers"], os.cpu_count() or 1
    if _busy(values):
        found.append(
            f"--workers {workers + 1}: the client used {values['client_cpu']:.2f} of {values['client_cores']} cores"
        )
    if punctual and punctual["seconds"] < punctual["of"]:
        held = punctual["rate"]
        if held and punctual["seconds"] > punctual["of"] / 2:
            found.append("run it again when less else runs here: the client held the rate most of the time")
        else:
            lower = SLOWER * (held or values["rate"]["achieved"])
            found.append(f"--rate {max(float(f'{lower:.2g}'), 1):g}: a rate that the client can hold here")
    shared = f"this one has {cores} cores for client and server" if cores > 1 else "this one has a single core"
    return [*found, f"give the client a core of its own (taskset), or another machine: {shared}"]
