"""Summary: the JSON document of a load run, from its result file. Nothing here touches a server."""

from pathlib import Path
from typing import Any

import numpy as np

from loadtest import validity
from loadtest.breakdown import by_model
from loadtest.commandline import document
from loadtest.errors import BadInput
from loadtest.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, Results, read
from loadtest.statistics import Seconds, milliseconds, percentile


def summarize(path: Path) -> dict[str, Any]:
    """Return the JSON document of a load run.

    Raises:
        BadInput: `path` is not a result file.
    """
    return load_file(path)[1]


def load_file(path: Path) -> tuple[Results, dict[str, Any]]:
    """Return what a result file holds, and its JSON document.

    Raises:
        BadInput: `path` is not a result file.
    """
    results = read(path)
    try:
        return results, summary(results)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"its first or last line is not that of a result file: {error!r}",
            where=str(path),
            fix="give a file that `loadtest run` wrote",
        ) from error


def summary(results: Results) -> dict[str, Any]:
    """Return the JSON document of a load run that is already in memory.

    Latency counts from the planned time and service time from the sending, over the requests that were answered right
    or that timed out: leaving the timed-out ones away would make a failing server look fast.
    """
    header, end = results.header, results.end or {}
    counted = results.of(OK, MISMATCH, TIMEOUT)
    lag = _lag(results)
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
        lag_ms={"p99": percentile(lag, 99) * 1e3, "max": percentile(lag, 100) * 1e3},
        models=by_model(results, sending_time(results)),
        client_cpu=end.get("client_cpu"),
        client_cores=end.get("client_cores", 1),
        server=_server(results),
        errors=end.get("errors", []),
        checked=end.get("checked", 0),
        mismatches=end.get("mismatches", []),
        thresholds=[],
    )
    limit = validity.largest_lag(values) / 1e3
    values["requests"]["late"] = int((results.sent - results.planned > limit).sum()) if results.open else 0
    values["why"], values["fix"] = validity.why_invalid(values, results)
    values["valid"] = not values["why"]
    values["notes"] = _notes(values, end)
    return values


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
    values |= {"reconciled": counts["success"] == int(ok.sum()), "executions": counts["execution_count"]}
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
        notes.append(f"{requests['dropped']} requests ({share:.1%}) could not be sent; no latency counts them")
    if requests["late"]:
        share = requests["late"] / requests["planned"]
        notes.append(f"{requests['late']} requests ({share:.1%}) left late, which their latency counts")
    if requests["retried"]:
        notes.append(
            f"{requests['retried']} requests were sent more than once; their latency counts from the first time"
        )
    if server and not server["reconciled"]:
        more = server["success"] - requests["done"] - requests["mismatched"]
        why = "others sent requests too, as the probe of `serve up` does, or answers were lost"
        if more < 0:
            why = "another server answered too, or it was started again"
        notes.append(
            f"the server counted {abs(more)} successes {'more' if more > 0 else 'fewer'} than the client: {why}"
        )
    if any(part["payloads"] == 1 and not part.get("fresh") for part in values["parts"]):
        notes.append("every request carried the same values; caches may make the server look faster than it is")
    if end.get("server_error"):
        notes.append(f"the server's own figures are missing: {end['server_error']}")
    return notes
