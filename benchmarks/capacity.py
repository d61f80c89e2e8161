"""Capacity: how near repeated searches come to the truth, against a staged server whose truth is known.

Run it on a machine with nothing else to do:

    python benchmarks/capacity.py --runs 10
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import queues
from rich.console import Console
from rich.table import Table

from loadtest.load import drive
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.probing import probe
from loadtest.probing.search import Budget, Found, search
from loadtest.record.results import read
from loadtest.selftest import nullserver


@click.command()
@click.option("--runs", default=10, show_default=True, help="Searches.")
@click.option("--service", default=0.002, show_default=True, help="Seconds that the staged server takes for a request.")
@click.option("--limit", default=0.02, show_default=True, help="Seconds that the p99 may take.")
@click.option("--budget", default=150.0, show_default=True, help="Seconds for each search.")
def main(runs: int, service: float, limit: float, budget: float) -> None:
    """Search the capacity of a staged server again and again and count how often the interval holds the truth."""
    console = Console()
    table = Table("run", "rate/s", "low", "high", "off", "covers", "probes", "seconds", "stopped", box=None)
    rows = []
    with nullserver.running(service=service, instances=1) as server:
        way = _alone(server.http, server.model) - service
        truth = queues.fixed_edge(service, limit - way, 0.01)
        for run in range(runs):
            begun = time.monotonic()
            found = _searched(server.http, server.model, limit, budget, seed=1000 * run)
            covers, off = found.low <= truth <= found.high, found.rate / truth - 1
            rows.append((off, covers))
            table.add_row(
                str(run + 1), f"{found.rate:.1f}", f"{found.low:.1f}", f"{found.high:.1f}", f"{off:+.1%}",
                "yes" if covers else "NO", str(len(found.probes)), f"{time.monotonic() - begun:.0f}", found.stopped,
            )  # fmt: skip
            console.print(f"run {run + 1}: {found.rate:.1f}/s ({off:+.1%})")
    off, covers = map(np.array, zip(*rows, strict=True))
    queue = f"M/D/1 with {service * 1e3:g} ms and {way * 1e3:.2f} ms on the way"
    console.print(f"truth: {truth:.1f}/s, {queue}, p99 < {limit * 1e3:g} ms", table)
    console.print(
        f"covered {covers.sum()} of {runs}; within 5 %: {(np.abs(off) <= 0.05).sum()}; spread {off.std():.1%}"
    )


def _alone(url: str, model: str) -> float:
    """Return the median latency, in seconds, of requests that find nobody before them: the service and the way."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "alone.jsonl"
        drive.run(Plan(url, 5.0, rate=200.0), _parts(model), path)
        results = read(path)
    return float(np.median(results.done - results.planned))


def _parts(model: str) -> list[Part]:
    return [Part(model, [{"x": np.zeros((1, 16), np.float32)}])]


def _searched(url: str, model: str, limit: float, budget: float, seed: int) -> Found:
    plan = Plan(url, 10.0, rate=1.0, arrival="poisson", seed=seed)
    parts, asked = _parts(model), probe.conditions([f"p99 < {limit * 1e3:g}ms"])
    spending = Budget(plan.duration, budget)
    start = probe.guess(plan, parts)
    return search(probe.prober(plan, parts, asked), [one.allowed for one in asked], start, spending)


if __name__ == "__main__":
    main()
