"""Report: a run's document as text for a terminal, and the texts that every other report takes from it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.judge.thresholds import line
from loadtest.record.statistics import number
from loadtest.record.table import NONE, table


def text(values: dict[str, Any]) -> RenderableType:
    """Return the report for a terminal of 60 columns or more."""
    parts: list[RenderableType] = [*_headline(values), Text(), _latency_table(values), Text(), _facts_table(values)]
    if len(values["models"]) > 1:
        parts += [Text(), _models_table(values)]
    if values["errors"]:
        errors = table("count", "error", figures=NONE, title="errors", title_justify="left")
        for error in values["errors"]:
            errors.add_row(f"{error['count']:,}", Text(error["text"]))
        parts += [Text(), errors]
    if values["mismatches"]:
        wrong = table(*MISMATCH_COLUMNS, figures=NONE, title="wrong outputs, the first", title_justify="left")
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


def several(runs: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Return several runs beside each other, each with a name, in the order of their rates."""
    heads = ("run", "", "offered/s", "achieved/s", "failed", "p50 ms", "p90 ms", "p99 ms", "max ms")
    shown = table(*heads, figures=slice(2, None), spare=("p90 ms", "offered/s", "max ms"))
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
    if values.get("sound"):
        lines += [Text(f"all the same: {line}") for line in values["sound"]["text"]]
        lines += [Text(f"for the rest: {line}") for line in values["sound"]["how"]]
    lines += [Text(f"note: {note}", style="yellow") for note in values["notes"]]
    lines += [Text(line(verdict), style="green" if verdict["passed"] else "red") for verdict in values["thresholds"]]
    return [*lines, Text(plan_line(values))]


def plan_line(values: dict[str, Any]) -> str:
    """Return the plan in one line."""
    plan = values["plan"]
    version = {part["version"]: f" version {part['version']}" if part["version"] else "" for part in values["parts"]}
    models = " + ".join(f"{part['model']}{version[part['version']]} batch {part['batch']}" for part in values["parts"])
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
    shown = table("ms", "mean", "p50", "p90", "p99", "p99.9", "max")
    keys = ("mean", "p50", "p90", "p99", "p999", "max")
    for name, figures in latencies(values):
        shown.add_row(name, *(number(figures[at]) for at in keys))
    return shown


def latencies(values: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return the rows of the table of latencies: latency, service, and of a closed loop the corrected latency."""
    rows = [("latency", values["latency_ms"]), ("service", values["service_ms"])]
    return [*rows, ("corrected", values["corrected_ms"])] if values["corrected_ms"] else rows


def _models_table(values: dict[str, Any]) -> Table:
    shown = table("model", "answered", "failed", "per s", "p50 ms", "p99 ms", spare=("p50 ms",))
    for row in values["models"]:
        counts = [f"{row['done']:,}", f"{row['failed']:,}", number(row["rate"])]
        shown.add_row(row["model"], *counts, number(row["latency_ms"]["p50"]), number(row["latency_ms"]["p99"]))
    return shown


def _facts_table(values: dict[str, Any]) -> Table:
    shown = table(show_header=False)
    for name, fact in facts(values):
        shown.add_row(name, Text(fact))
    return shown


def facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures that stand beside the latencies, each as a name and a text."""
    rate, server = values["rate"], values["server"]
    stated = [part["tolerance"] for part in values["parts"] if part["tolerance"] is not None]
    tolerances = [one for each in stated for one in (each.values() if isinstance(each, dict) else [each])]
    rows = [("throughput", f"{rate['achieved']:,.1f} requests/s, {rate['samples']:,.1f} samples/s")]
    if values["corrected_ms"]:
        rows.append(("latency is", "from the sending: a closed loop has no planned times"))
        rows.append(("corrected is", "as if requests had been due at the rate reached"))
    if values["plan"]["concurrency"] is None:
        rows.append(("offered", f"{rate['offered']:,.1f} requests/s"))
        rows.append(("lag p99", f"{number(values['lag_ms']['p99'])} ms"))
    gap = values["longest_gap"]
    rows.append(("longest gap", f"{number(gap['seconds'])} s without an answer, at {number(gap['at'])} s"))
    if several := values["responses"]:
        rows.append(("responses", f"{number(several['per_request'])} to a request"))
        for name, key in (("first response", "first_ms"), ("between two", "gap_ms")):
            rows.append((name, f"p50 {number(several[key]['p50'])} ms, p99 {number(several[key]['p99'])} ms"))
    checked = "not checked"
    if tolerances and values["checked"]:
        checked = f"{values['checked']:,} checked, {max(tolerances):.2g} allowed"
    rows.append(("outputs", checked))
    if values["client_cpu"] is not None:
        rows.append(("client CPU", f"{values['client_cpu']:.2f} of {values['client_cores']} cores"))
    if server and "request_ms" in server:
        rows.append(("server", f"{number(server['queue_ms'])} ms queue + {number(server['compute_ms'])} ms compute"))
        rows.append(("mean batch", f"{number(server['mean_batch'])} samples, {server['executions']:,} executions"))
        equal = "equal" if server["reconciled"] else "not equal"
        probes = f" with the {server['probes']:,} of `serve up`'s probe" if server.get("probes") else ""
        rows.append(("server's count", f"{server['success']:,} ({equal} to ours{probes})"))
        ours = "" if server["overhead"] is None else f", ours {server['overhead']:+.1%}"
        rows.append(("server's time", f"{number(server['request_ms'])} ms a request{ours}"))
    return rows
