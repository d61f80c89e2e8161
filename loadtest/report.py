"""Report: readers of a result file. Nothing here touches a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.breakdown import by_model
from loadtest.commandline import document
from loadtest.errors import BadInput
from loadtest.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, Results, read
from loadtest.statistics import Seconds, milliseconds, percentile
from loadtest.thresholds import line

LARGEST_LAG_MS = 1.0
LARGEST_LAG_SHARE = 0.1
BUSIEST_CLIENT = 0.8


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
    limit = _largest_lag(values) / 1e3
    values["requests"]["late"] = int((results.sent - results.planned > limit).sum()) if results.open else 0
    values["why"], values["fix"] = _why_invalid(values, results)
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


def _why_invalid(values: dict[str, Any], results: Results) -> tuple[str, str]:
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


def _largest_lag(values: dict[str, Any]) -> float:
    """Return the milliseconds that an open loop's requests may leave late."""
    return float(np.fmax(LARGEST_LAG_MS, LARGEST_LAG_SHARE * values["latency_ms"]["p50"]))


def _why_not_the_planned_load(values: dict[str, Any]) -> tuple[str, str]:
    limit, lag = _largest_lag(values), values["lag_ms"]["p99"]
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


def text(values: dict[str, Any]) -> RenderableType:
    """Return the report for a terminal of 60 columns or more."""
    parts: list[RenderableType] = [*_headline(values), Text(), _latency_table(values), Text(), _facts_table(values)]
    if len(values["models"]) > 1:
        parts += [Text(), _models_table(values)]
    if values["errors"]:
        errors = Table("count", "error", title="errors", title_justify="left", box=None)
        for error in values["errors"]:
            errors.add_row(f"{error['count']:,}", Text(error["text"]))
        parts += [Text(), errors]
    if values["mismatches"]:
        wrong = Table(*MISMATCH_COLUMNS, title="wrong outputs, the first", title_justify="left", box=None)
        for row in mismatch_rows(values):
            wrong.add_row(*map(Text, row))
        parts += [Text(), wrong]
    return Group(*parts)


MISMATCH_COLUMNS = ("request", "payload", "output", "index", "expected", "got")


def mismatch_rows(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the wrong answers that were kept, a text for each of `MISMATCH_COLUMNS`."""

    def shown(value: Any) -> str:
        return f"{value:.7g}" if isinstance(value, float) else str(value)

    return [
        tuple("-" if one[key] is None else shown(one[key]) for key in ("n", *MISMATCH_COLUMNS[1:]))
        for one in values["mismatches"]
    ]


def table(runs: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Return several runs beside each other, each with a name, in the order of their rates."""
    heads = ("run", "", "offered/s", "achieved/s", "failed", "p50 ms", "p90 ms", "p99 ms", "max ms")
    shown = Table(*heads, box=None, pad_edge=False)
    for column in shown.columns[2:]:
        column.justify = "right"
    for name, values in sorted(runs, key=lambda run: run[1]["rate"]["achieved"]):
        rates = [number(values["rate"][key]) for key in ("offered", "achieved")]
        latency = [number(values["latency_ms"][key]) for key in ("p50", "p90", "p99", "max")]
        word = Text("" if values["valid"] else "INVALID", style="red")
        shown.add_row(Text(name), word, *rates, f"{values['requests']['failed']:,}", *latency)
    return shown


def headline(values: dict[str, Any]) -> str:
    """Return the first line of every report: whether the run counts, and what became of its requests."""
    requests = values["requests"]
    counts = [f"{requests['done']:,} of {requests['planned']:,} requests answered", f"{requests['failed']:,} failed"]
    counts.append(f"{requests['dropped']:,} dropped")
    if requests["mismatched"]:
        counts.append(f"{requests['mismatched']:,} with wrong outputs")
    return ("valid run: " if values["valid"] else "INVALID RUN: ") + ", ".join(counts)


def _headline(values: dict[str, Any]) -> list[Text]:
    lines = [Text(headline(values), style="bold green" if values["valid"] else "bold red")]
    if values["why"]:
        lines.append(Text(f"why: {values['why']}", style="red"))
    lines += [Text(f"note: {note}", style="yellow") for note in values["notes"]]
    lines += [Text(line(verdict), style="green" if verdict["passed"] else "red") for verdict in values["thresholds"]]
    return [*lines, Text(plan_line(values))]


def plan_line(values: dict[str, Any]) -> str:
    """Return the plan in one line."""
    plan = values["plan"]
    models = " + ".join(f"{part['model']} version {part['version']} batch {part['batch']}" for part in values["parts"])
    return f"{models} at {values['url']}, {load(plan)}, {plan['duration']:g} s"


def load(plan: dict[str, Any]) -> str:
    """Return the kind of load in a few words."""
    if plan["concurrency"] is not None:
        think = f", thinking {plan['think']:g} s" if plan["think"] else ""
        return f"closed loop, {plan['concurrency']} in flight{think}"
    if plan["trace"] is not None:
        speed = "" if plan["speed"] == 1 else f" at {plan['speed']:g} times the speed"
        return f"open loop, the times of {plan['trace']}{speed}"
    profile = "" if plan["profile"] == "flat" else f" {plan['profile']}"
    return f"open loop, {plan['rate']:g}/s {plan['arrival']}{profile}"


def _latency_table(values: dict[str, Any]) -> Table:
    table = Table("ms", *(("mean", "p50", "p90", "p99", "p99.9", "max")), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    keys = ("mean", "p50", "p90", "p99", "p999", "max")
    for name, key in (("latency", "latency_ms"), ("service", "service_ms")):
        table.add_row(name, *(number(values[key][at]) for at in keys))
    return table


def _models_table(values: dict[str, Any]) -> Table:
    table = Table("model", "answered", "failed", "per s", "p50 ms", "p99 ms", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in values["models"]:
        counts = [f"{row['done']:,}", f"{row['failed']:,}", number(row["rate"])]
        table.add_row(row["model"], *counts, number(row["latency_ms"]["p50"]), number(row["latency_ms"]["p99"]))
    return table


def _facts_table(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts(values):
        table.add_row(name, Text(fact))
    return table


def facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures that stand beside the latencies, each as a name and a text."""
    rate, server = values["rate"], values["server"]
    tolerances = [part["tolerance"] for part in values["parts"] if part["tolerance"] is not None]
    rows = [("throughput", f"{rate['achieved']:,.1f} requests/s, {rate['samples']:,.1f} samples/s")]
    if values["plan"]["concurrency"] is None:
        rows.append(("offered", f"{rate['offered']:,.1f} requests/s"))
        rows.append(("lag p99", f"{number(values['lag_ms']['p99'])} ms"))
    checked = "not checked"
    if tolerances and values["checked"]:
        checked = f"{values['checked']:,} checked, {max(tolerances):.2g} allowed"
    rows.append(("outputs", checked))
    if values["client_cpu"] is not None:
        rows.append(("client CPU", f"{values['client_cpu']:.2f} of {values['client_cores']} cores"))
    if server and "request_ms" in server:
        rows.append(("server", f"{number(server['queue_ms'])} ms queue + {number(server['compute_ms'])} ms compute"))
        rows.append(("mean batch", f"{number(server['mean_batch'])} samples, {server['executions']:,} executions"))
        rows.append(
            ("server's count", f"{server['success']:,} ({'equal' if server['reconciled'] else 'not equal'} to ours)")
        )
        ours = "" if server["overhead"] is None else f", ours {server['overhead']:+.1%}"
        rows.append(("server's time", f"{number(server['request_ms'])} ms a request{ours}"))
    return rows


def number(value: float | None) -> str:
    """Return a figure with three significant digits and without an exponent; a dash when there is none."""
    if value is None or value != value:
        return "-"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value))))) if value else 0
    return f"{value:,.{digits}f}"
