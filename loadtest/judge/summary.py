"""Summary: the JSON document of a load run, from its result file. Nothing here touches a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.judge import sound, thresholds, validity
from loadtest.judge.breakdown import by_model
from loadtest.record.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, VERDICTS, Results, read
from loadtest.record.statistics import Seconds, largest, milliseconds
from modelathe.commandline import document
from modelathe.errors import BadInput

_SHORTEST = 1e-6


def summarize(path: Path, sentences: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON document of a load run; see `summary`.

    Raises:
        BadInput: `path` is not a result file.
    """
    return load_file(path, sentences)[1]


def load_file(path: Path, sentences: Sequence[str] = ()) -> tuple[Results, dict[str, Any]]:
    """Return what a result file holds, and its JSON document; see `summary`.

    Raises:
        BadInput: `path` is not a result file.
    """
    results = read(path)
    try:
        return results, summary(results, sentences)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"its first or last line is not that of a result file: {error!r}",
            where=str(path),
            fix="give a file that `loadtest run` wrote",
        ) from error


def summary(results: Results, sentences: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON document of a load run that is already in memory.

    Latency counts from the planned time and service time from the sending, over the requests that were answered or
    that timed out: leaving the timed-out ones away would make a failing server look fast. A closed loop plans nothing,
    so its latency counts from the sending too; `corrected_ms` says what it would have been otherwise.

    Args:
        results: the run.
        sentences: thresholds that it is judged by; its plan's own where none are given.
    """
    header, end = results.header, results.end or {}
    asked = thresholds.parse(sentences or header["plan"].get("thresholds", ()))
    counted = results.of(OK, MISMATCH, TIMEOUT)
    lag, (latency, service) = _lag(results), judged(results)
    values = document(
        valid=False,
        why="",
        fix="",
        notes=[],
        model=header["model"],
        url=header["url"],
        version=header.get("model_version", ""),
        plan=header["plan"],
        parts=header["parts"],
        requests=_requests(results),
        rate=_rate(results),
        latency_ms=milliseconds((results.done - results.planned)[counted]),
        service_ms=milliseconds((results.done - results.sent)[counted & ~np.isnan(results.sent)]),
        corrected_ms=None if results.open else milliseconds(corrected(results)),
        judged_ms={"latency_ms": milliseconds(latency), "service_ms": milliseconds(service)},
        longest_gap=_longest_gap(results),
        lag_ms={key: value for key, value in milliseconds(lag).items() if key in ("p99", "p999", "max")},
        loop_lag_ms=end.get("loop_lag_ms") or {},
        backlog=end.get("backlog"),
        responses=_responses(results),
        models=by_model(results, sending_time(results)),
        **_client(end),
        server=_server(results),
        errors=end.get("errors", []),
        checked=end.get("checked", 0),
        mismatches=end.get("mismatches", []),
        thresholds=[],
    )
    limit = validity.largest_lag(values) / 1e3
    values["requests"]["late"] = int((results.sent - results.planned > limit).sum()) if results.open else 0
    percentiles = {one.metric.key for one in asked if one.metric.kind == "time"}
    unlimited = any(one.metric.key == "failed" for one in asked)
    invalid = validity.why_invalid(values, results, percentiles, limited=not unlimited)
    values |= invalid._asdict()
    values["valid"] = not values["why"]
    values["sound"] = sound.sound(results, values)
    values["notes"] = _notes(values, end)
    values["thresholds"] = thresholds.judge(values, [one.text for one in asked])
    return values


def corrected(results: Results) -> Seconds:
    """Return a closed loop's latencies as if requests had been due at the rate that it reached.

    A user of a closed loop whose request takes long sends nothing meanwhile, so one figure stands for many that would
    have waited. As HdrHistogram does it (G. Tene, `recordValueWithExpectedInterval`), a latency that is longer than the
    mean time between two requests of one user stands for a series that falls by that time.
    """
    latency, verdict = _series(results)
    return latency[np.isin(verdict, VERDICTS.index(ERROR), invert=True)]


def _series(results: Results) -> tuple[Seconds, NDArray[np.int8]]:
    """Return the corrected latencies of all requests that ended, and the verdict of the request behind each."""
    ended = results.of(OK, MISMATCH, TIMEOUT, ERROR)
    latency, verdict = (results.done - results.planned)[ended], results.verdict[ended]
    if not len(latency):
        return latency, verdict
    interval = max(float(latency.mean()) + results.header["plan"].get("think", 0.0), _SHORTEST)
    more = np.maximum(np.floor(latency / interval).astype(np.int64) - 1, 0)
    place = np.arange(more.sum()) - np.repeat(np.cumsum(more) - more, more)
    falling = np.repeat(latency, more) - interval * (place + 1)
    return np.append(latency, falling), np.append(verdict, np.repeat(verdict, more))


def judged(results: Results) -> tuple[Seconds, Seconds]:
    """Return the latencies and service times that thresholds judge: those of a failed request are infinite.

    Latencies are those from the planned time; a closed loop's are the corrected ones, and the whole series that a
    failed request stands for is infinite.
    """
    failed = results.of(ERROR, TIMEOUT)
    answered = results.of(OK, MISMATCH)
    service = np.append((results.done - results.sent)[answered], np.full(failed.sum(), np.inf))
    if results.open:
        lost = failed | results.of(DROPPED)
        return np.append((results.done - results.planned)[answered], np.full(lost.sum(), np.inf)), service
    latency, verdict = _series(results)
    return np.where(np.isin(verdict, [VERDICTS.index(ERROR), VERDICTS.index(TIMEOUT)]), np.inf, latency), service


def _client(end: dict[str, Any]) -> dict[str, float | None]:
    """Return how many cores the client used and how many it had; None of a run that was interrupted.

    Raises:
        KeyError, TypeError, ValueError: the last line does not say it.
    """
    if not end:
        return {"client_cpu": None, "client_cores": None}
    used, had = end["client_cpu"], end["client_cores"]
    if not (used >= 0 and had >= 1):
        raise ValueError(f"client_cpu is {used} and client_cores {had}")
    return {"client_cpu": used, "client_cores": had}


def _longest_gap(results: Results) -> dict[str, float]:
    """Return the longest time without an answer while the run sent: `seconds`, and the second `at` which it began."""
    end = sending_time(results)
    done = np.sort(results.done[results.of(OK, MISMATCH)])
    moments = np.concatenate([[0.0], done[done < end], [end]])
    gaps = np.diff(moments)
    at = int(gaps.argmax())
    return {"seconds": float(gaps[at]), "at": float(moments[at])}


def _lag(results: Results) -> Seconds:
    """Return how late the requests left; a dropped one is as late as the end of the run, and more."""
    left = np.where(results.of(DROPPED), sending_time(results), results.sent)
    # A request that never found a connection has no sending time.
    return (left - results.planned)[~np.isnan(left)]


def _requests(results: Results) -> dict[str, int]:
    return {
        "planned": len(results.planned),
        "sent": int((~np.isnan(results.sent)).sum()),
        "done": int(results.of(OK).sum()),
        "failed": int(results.of(ERROR, TIMEOUT).sum()),
        "timed_out": int(results.of(TIMEOUT).sum()),
        "dropped": int(results.of(DROPPED).sum()),
        "mismatched": int(results.of(MISMATCH).sum()),
        "retried": int((results.tries > 1).sum()),
    }


def sending_time(results: Results) -> float:
    """Return the seconds during which the run sent: the planned duration, or less when it was cut short."""
    planned = float(results.header["plan"]["duration"])
    if results.end is not None:
        return min(planned, float(results.end["end"]))
    done = results.done[~np.isnan(results.done)]
    return min(planned, float(done.max())) if len(done) else planned


def _rate(results: Results) -> dict[str, float]:
    seconds = sending_time(results)
    in_time = results.of(OK) & (results.done <= seconds)
    achieved = float(in_time.sum()) / seconds
    plan, sent = results.header["plan"], ~np.isnan(results.sent)
    steady = results.open and plan["rate"] and plan["profile"] == "flat"
    # A closed loop has no rate of its own: what it offered is what it sent.
    offered = plan["rate"] if steady else float((sent | results.open).sum()) / seconds
    sizes = (part.get("batches") or [part["batch"]] * part["payloads"] for part in results.header["parts"])
    batches = np.array([size for part in sizes for size in part])
    samples = float(batches[results.payload[in_time]].sum()) / seconds
    return {"offered": offered, "achieved": achieved, "samples": samples}


def _server(results: Results) -> dict[str, Any] | None:
    """Return what the server counted, per successful request, beside our own count of them."""
    counts = (results.end or {}).get("server")
    if not counts:
        return None
    ok = results.of(OK, MISMATCH)
    values: dict[str, Any] = {key: counts[key] for key in ("success", "fail")}
    values["probes"] = probes = counts.get("probes", 0)
    reconciled = counts["success"] - probes == int(ok.sum())
    values |= {"reconciled": reconciled, "executions": counts["execution_count"]}
    if not counts["success"]:
        return values

    def mean_ms(name: str) -> float:
        return float(counts[name] / counts["success"] / 1e6)

    parts = {f"{part}_ms": mean_ms(f"{part}_ns") for part in ("compute_input", "compute_infer", "compute_output")}
    request = mean_ms("success_ns")
    service = float((results.done - results.sent)[ok].mean()) * 1e3 if ok.any() else float("nan")
    values |= {"request_ms": request, "queue_ms": mean_ms("queue_ns"), "compute_ms": sum(parts.values()), **parts}
    values |= {"service_ms": service, "overhead": service / request - 1 if request else None}
    executions = counts["execution_count"]
    values["mean_batch"] = counts["inference_count"] / executions if executions else None
    values["batches"] = counts.get("batches", {})
    return values


def _notes(values: dict[str, Any], end: dict[str, Any]) -> list[str]:
    requests, server, notes = values["requests"], values["server"], []
    if requests["dropped"]:
        share = requests["dropped"] / requests["planned"]
        notes.append(f"{requests['dropped']} requests ({share:.1%}) could not be sent; only thresholds count them")
    if same := largest(requests["done"] + requests["mismatched"] + requests["timed_out"]):
        notes.append(f"{' and '.join(same)} of so few requests: the largest value")
    if requests["late"]:
        share = requests["late"] / requests["planned"]
        notes.append(f"{requests['late']} requests ({share:.1%}) left late, which their latency counts")
    if requests["retried"]:
        notes.append(
            f"{requests['retried']} requests were sent more than once; their latency counts from the first time"
        )
    if server and not server["reconciled"]:
        more = server["success"] - server["probes"] - requests["done"] - requests["mismatched"]
        why = "others sent requests too, as the probe of a `serve up` on another machine does, or answers were lost"
        if more < 0:
            why = "another server answered too, or it was started again"
        notes.append(
            f"the server counted {abs(more)} successes {'more' if more > 0 else 'fewer'} than the client: {why}"
        )
    if any(part["payloads"] == 1 and not part.get("fresh") for part in values["parts"]):
        notes.append("every request carried the same values; caches may make the server look faster than it is")
    notes += [f"not known, since the server does not say it: {what}" for what in end.get("unknown", ())]
    if end.get("server_error"):
        notes.append(f"the server's own figures are missing: {end['server_error']}")
    return notes


def _responses(results: Results) -> dict[str, Any] | None:
    """Return what the responses of answered requests say; None where each request had one.

    Returns:
        `requests` (answered in several), `per_request` (their mean number of responses), `first_ms` (percentiles of the
        time from the planned moment to the first one) and `gap_ms` (of the times between one and the next).
    """
    responses, answered = results.responses, results.of("ok", "mismatch")
    if responses is None:
        return None
    kept = answered[responses.request]
    request, at = responses.request[kept], responses.at[kept]
    if not len(request):
        return None
    begins = np.concatenate([[True], np.diff(request) > 0])
    return {
        "requests": int(begins.sum()),
        "per_request": len(request) / int(begins.sum()),
        "first_ms": milliseconds(at[begins] - results.planned[request[begins]]),
        "gap_ms": milliseconds(np.diff(at)[~begins[1:]]),
    }
