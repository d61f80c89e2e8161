"""`serve watch`."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import Duration
from modelathe.commandline import document, emit, json_option
from modelathe.errors import MachineError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from serve.server.state import Running
    from serve.watch.metrics import Rates

SHORTEST = 0.1
_HEADINGS = ("req/s", "p50\nms", "p95\nms", "p99\nms", "batch", "queue\nms", "compute\nms", "pending", "failed/s")
_NARROW = ("req/s", "p99\nms", "batch", "queue\nms", "failed/s")
"""What a terminal below 80 columns has room for."""
_WIDE = 160
"""Columns where there is no terminal to fit."""


@click.command()
@click.option("--url", help="The metrics, as http://HOST:PORT.  [default: those of the `serve up` that runs]")
@click.option("--interval", type=Duration(), default="2s", show_default=True, help="Time between two looks.")
@click.option("--count", type=click.IntRange(1), help="How many intervals.  [default: until Ctrl-C; with --json 1]")
@json_option
def watch(url: str | None, interval: float, count: int | None, as_json: bool) -> None:
    """Show what every model does right now: requests, latency, batches, queue and compute, failures, memory.

    Rates and means are those of the interval, latency quantiles are Triton's own, over a sliding window; it has
    none for a model with a response cache. A request that a full queue refuses is counted nowhere by Triton 24.10, one
    that waited too long is. The requests of the probe of `serve up` count too. A terminal below 80 columns gets fewer.

    \b
    Example:
      serve watch --interval 5s
    """
    from loadtest.load.metrics import MACHINE_USED
    from serve.watch import metrics

    if interval < SHORTEST:
        raise UsageError("--interval is too short", fix=f"give {SHORTEST * 1000:.0f}ms or more")
    place, server = _found(url)
    seen: list[dict[str, Any]] = []
    try:
        before = metrics.fetch(place)
        with _showing(as_json, place) as show:
            for _ in range(count or 1) if count or as_json else itertools.count():
                time.sleep(interval)
                after = metrics.fetch(place)
                # Of a model whose process died once, Triton 24.10 keeps the metrics when the model is gone.
                rates = [
                    model
                    for model in metrics.between(before, after)
                    if server is None or (server.repository / model.model).exists()
                ]
                memory = {
                    "server_pss_bytes": metrics.memory(server.endpoint.pid) if server and server.endpoint else None,
                    "machine_used_bytes": after.machine.get(MACHINE_USED),
                    "machine_total_bytes": after.machine.get(metrics.MACHINE_TOTAL),
                }
                if as_json:
                    models = [asdict(model) for model in rates]
                    seen.append({"seconds": after.at - before.at, "models": models, "memory": memory})
                show(rates, memory)
                before = after
    except MachineError as error:
        error.partial = {"url": f"http://{place}", "intervals": seen}
        raise
    if as_json:
        emit(document(url=f"http://{place}", intervals=seen))


def _found(url: str | None) -> "tuple[str, Running | None]":
    """Return the address to ask, and the server there where it is a `serve up` of this user's."""
    from serve.server import state
    from serve.watch import metrics

    running = {metrics.address(one.endpoint.metrics): one for one in state.everything() if one.endpoint}
    if url:
        place = metrics.address(url)
        return place, running.get(place.replace("localhost", "127.0.0.1"))
    if len(running) != 1:
        urls = ", ".join(f"http://{place}" for place in running)
        raise MachineError(
            "several servers run" if running else "no server runs",
            fix=f"say --url; there are {urls}" if running else "start one with: serve up REPOSITORY, or say --url",
        )
    return next(iter(running.items()))


@contextmanager
def _showing(as_json: bool, place: str) -> "Iterator[Callable[[list[Rates], dict[str, Any]], None]]":
    """Yield what shows an interval: one live table on a terminal, one table after the other elsewhere."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if as_json:
        yield lambda rates, memory: None
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda rates, memory: live.update(_view(place, rates, memory, console.width), refresh=True)
    else:
        console = Console(width=_WIDE)
        yield lambda rates, memory: console.print(_view(place, rates, memory))


def _view(place: str, rates: "list[Rates]", memory: dict[str, Any], width: int = _WIDE) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from loadtest.record.statistics import number
    from loadtest.record.table import table

    headings = _NARROW if width < 80 else _HEADINGS
    shown = table("model", *headings)
    shown.columns[0].overflow = "fold"  # the only one that gives way on a narrow terminal
    for column in shown.columns[1:]:
        column.no_wrap = True
    for model in rates:
        shown.add_row(f"{model.model} {model.version}", *map(_row(model).get, headings))
    reasons = [
        f"{model.model} {model.version} failed: {reason} {number(rate)}/s"
        for model in rates
        for reason, rate in model.failures.items()
        if rate
    ]
    head = f"http://{place}  {datetime.now():%H:%M:%S}"
    return Group(Text(head), shown, *map(Text, reasons), Text(_memory(memory)), Text(""))


def _row(model: "Rates") -> dict[str, str]:
    """Return what stands below each heading."""
    from loadtest.record.statistics import number

    quantiles = (model.quantiles_ms.get(quantile) for quantile in ("0.5", "0.95", "0.99"))
    figures = map(number, (model.requests, *quantiles, model.batch, model.queue_ms, model.compute_ms))
    row = (*figures, f"{model.pending}", number(sum(model.failures.values())))
    return dict(zip(_HEADINGS, row, strict=True))


def _memory(memory: dict[str, Any]) -> str:
    if memory["server_pss_bytes"] is not None:
        return f"memory: {memory['server_pss_bytes'] / 2**20:.0f} MiB, all processes of the server"
    if memory["machine_used_bytes"] is None:
        return "memory: unknown"
    used, total = memory["machine_used_bytes"] / 2**20, (memory["machine_total_bytes"] or math.nan) / 2**20
    return f"memory: {used:.0f} of {total:.0f} MiB used on the server's machine, by whatever runs there"
