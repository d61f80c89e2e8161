"""The plan's engine beside the exact simulation, and how long the largest fleet takes."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from plan import staged

from serve.planning.engines.calls import Calls, capacity
from serve.planning.engines.exact import Replicas
from serve.planning.engines.lanes import Lanes
from serve.simulate.configuration import Configuration
from tuning.ledger import Figures, Ledger, Rule

REPLICAS, REQUESTS, LARGEST = 20, 400_000, 32
SHARES, INSTANCES = (0.2, 0.5, 0.8), (1, 2)
FLEET, LOAD = 10_000, 10_000_000
WANTED = {
    f"{REPLICAS} replicas, lanes beside exact: p50, largest difference": Rule("≤", 0.02),
    f"{REPLICAS} replicas, lanes beside exact: p99, largest difference": Rule("≤", 0.02),
    "10,000 replicas, 10 M requests: seconds": Rule("≤", 60.0),
    "10,000 replicas, 10 M requests: GiB": Rule("≤", 4.0),
}
COLUMNS = ("replicas", "rate of each", "p50 ms", "p99 ms", "seconds", "GiB")


def run(ledger: Ledger) -> None:
    """Compare small fleets, and simulate the large one."""
    for share in SHARES:
        for instances in INSTANCES:
            ledger.once(f"{REPLICAS}: {share:.0%}, {instances} instances", beside, share, instances)
    ledger.once("large", large)


def beside(share: float, instances: int) -> dict[str, Any]:
    """Return percentiles of both engines for the same arrivals, with luck of their own."""
    curve, configuration = staged(), Configuration(LARGEST, instances=instances)
    rate, generator = share * capacity(curve, configuration), np.random.default_rng(1)
    at = np.cumsum(generator.standard_exponential(REQUESTS)) / (rate * REPLICAS)
    replica = generator.integers(REPLICAS, size=REQUESTS)
    lanes = Lanes(Calls(curve, LARGEST, generator), REPLICAS, LARGEST, instances)
    took = {
        "lanes": lanes.feed(at, replica, np.inf)[1],
        "exact": Replicas(curve, configuration, seed=2).run(at, replica),
    }
    times = {name: np.percentile(latency, (50, 99)) * 1e3 for name, latency in took.items()}
    told = {name: {"p50": float(p50), "p99": float(p99)} for name, (p50, p99) in times.items()}
    return {"replicas": REPLICAS, "rate": rate, **told}


def large() -> dict[str, Any]:
    """Simulate the large fleet in a process of its own, whose memory is that of the simulation."""
    words = ["benchmarks/plan.py", "--replicas", str(FLEET), "--requests", str(LOAD), "--json"]
    said = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield what was simulated."""
    yield from ledger.cells.values()


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return the largest differences, and what the large fleet took."""
    pairs = [row for row in found if "exact" in row]
    made = {
        f"{REPLICAS} replicas, lanes beside exact: {name}, largest difference": max(
            (abs(row["lanes"][name] / row["exact"][name] - 1) for row in pairs), default=float("nan")
        )
        for name in ("p50", "p99")
    }
    for row in found:
        if "seconds" in row:
            made |= {f"10,000 replicas, 10 M requests: {name}": row[name] for name in ("seconds", "GiB")}
    return made


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table; of small fleets lanes and exact."""
    for row in found:
        if "exact" in row:
            times = [f"{row['lanes'][name]:.2f} | {row['exact'][name]:.2f}" for name in ("p50", "p99")]
            yield (f"{row['replicas']:,}", f"{row['rate']:.0f}", *times, "", "")
        else:
            taken = (f"{row['seconds']:.1f}", f"{row['GiB']:.2f}")
            yield (f"{row['replicas']:,}", f"{row['rate']:.0f}", f"{row['p50']:.2f}", f"{row['p99']:.2f}", *taken)
