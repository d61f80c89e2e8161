"""Measure: what the load generator itself reaches on this machine, measured against the null server."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from loadtest.judge.summary import summarize
from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.table import Unbroken
from loadtest.selftest import nullserver
from loadtest.selftest.nullserver import NullServer
from modelathe.commandline import document
from modelathe.connection import PLAIN, Connection
from modelathe.tensors import TensorSpec

PROTOCOLS = {"http": ("http", PLAIN), "grpc": ("grpc", PLAIN), "grpc stream": ("grpc", Connection(streams=1))}
CONCURRENCIES = (1, 8, 32)
NEAR_THE_TOP = 0.7
"""Share of the ceiling that the open loop asks for; nearer to it, chance queues before the null server would show."""

_BUSY_CLIENT = 0.9
_BUSY_SERVER = 0.95
_SECONDS = 1.0
_PAYLOADS = 16


def measure(
    service: float = 0.0,
    stall: float = 0.0,
    each: int = 0,
    inputs: Sequence[TensorSpec] = nullserver.INPUTS,
    outputs: Sequence[TensorSpec] = nullserver.OUTPUTS,
    report: Callable[[str, float], None] = lambda text, share: None,
) -> dict[str, Any]:
    """Return the JSON document of a selftest; it takes some 20 seconds.

    Args:
        service: seconds that the null server holds each request.
        stall: seconds that it holds each `each`-th request longer.
        each: 0 never stalls.
        inputs: what the requests carry.
        outputs: what the answers carry.
        report: told what goes on, and how much of it is done.
    """
    payloads = payload.generate(inputs, _PAYLOADS, 0)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(PROTOCOLS):
            report(f"selftest: {name}", place / len(PROTOCOLS))
            # A server for each: what one protocol left in it is no matter of the next.
            with nullserver.running(service, stall, each, inputs=inputs, outputs=outputs) as server:
                parts = [Part(server.model, payloads, tolerance=0.0)]
                found.append(_protocol(name, server, parts, Path(folder), staged=bool(service or stall)))
    return document(staged={"service": service, "stall": stall, "each": each}, protocols=found)


def _protocol(name: str, server: NullServer, parts: list[Part], folder: Path, staged: bool) -> dict[str, Any]:
    def run(**load: Any) -> dict[str, Any]:
        scheme, connection = PROTOCOLS[name]
        plan = Plan(server.url(scheme), warmup=0.0, connection=connection, **load)
        before, path = server.cpu(), folder / "run.jsonl"
        drive.run(plan, parts, path)
        values = summarize(path)
        return {
            "concurrency": plan.concurrency,
            "rate": values["rate"]["achieved"],
            "client_cpu": values["client_cpu"],
            "server_cpu": (server.cpu() - before) / plan.duration,
            "latency_ms": values["latency_ms"],
            "lag_ms": values["lag_ms"],
            "failed": values["requests"]["failed"] + values["requests"]["mismatched"],
            "why_invalid": values["why"],
        }

    run(concurrency=8, duration=0.2)
    points = [run(concurrency=concurrency, duration=_SECONDS) for concurrency in CONCURRENCIES]
    best = max(points, key=lambda point: point["rate"])
    near = max(1.0, NEAR_THE_TOP * best["rate"])
    return {
        "protocol": name,
        "ceiling": {"rate": best["rate"], **_limit(best, staged)},
        "per_core": best["rate"] / max(best["client_cpu"], 1e-9),
        "added_ms": {key: points[0]["latency_ms"][key] for key in ("p50", "p99")},
        "closed": points,
        "open": {"asked": near, **run(rate=near, duration=_SECONDS)},
    }


def _limit(best: dict[str, Any], staged: bool) -> dict[str, Any]:
    """Say whether the generator was the limit; where it was not, it could have sent more."""
    if best["client_cpu"] >= _BUSY_CLIENT:
        return {"at_least": False, "limit": "generator"}
    if best["server_cpu"] >= _BUSY_SERVER:
        return {"at_least": True, "limit": "null server"}
    # Neither had a core to itself: other processes took them, or the answers were held back on purpose.
    return {"at_least": True, "limit": "staged times" if staged else "other load"}


def text(values: dict[str, Any]) -> RenderableType:
    """Return what a person reads of the document."""
    table = Unbroken("", *(found["protocol"] for found in values["protocols"]))
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "ceiling, req/s": lambda it: f"{'at least ' * it['ceiling']['at_least']}{it['ceiling']['rate']:,.0f}",
        "limited by": lambda it: str(it["ceiling"]["limit"]),
        "per client core, req/s": lambda it: f"{it['per_core']:,.0f}",
        "added latency p50, ms": lambda it: f"{it['added_ms']['p50']:.2f}",
        "added latency p99, ms": lambda it: f"{it['added_ms']['p99']:.2f}",
        "open loop at, req/s": lambda it: f"{it['open']['asked']:,.0f}",
        "its lag p99, ms": lambda it: f"{it['open']['lag_ms']['p99']:.2f}",
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, values["protocols"]))
    note = (
        "Ceiling: the best of 1, 8 and 32 requests in flight. Added latency: with one in flight, the null server's and "
        "the kernel's share included. Lag: how late an open loop sends."
    )
    return Group(table, Text(note, style="dim"))
