"""Plan: how long the simulation of a large fleet takes, and how much memory.

python benchmarks/plan.py --replicas 10000 --requests 10000000
"""

import json
import resource
import time

import click
import numpy as np

from serve.planning import BALANCERS, arrivals, objective
from serve.planning.engines.balancers import Balancer
from serve.planning.fleet import Fleet, simulate
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve


def staged() -> Curve:
    """Return a curve of calls that take 2 ms and 0.2 ms for each sample, lognormal."""
    generator = np.random.default_rng(0)
    sizes = [2**power for power in range(6)]
    return Curve({size: (0.002 + 0.0002 * size) * generator.lognormal(0, 0.1, 500) for size in sizes})


@click.command()
@click.option("--replicas", default=10_000, show_default=True, help="Replicas, all of them simulated.")
@click.option("--requests", default=10_000_000, show_default=True, help="Requests.")
@click.option("--each", default=1000.0, show_default=True, help="Requests per second of each replica.")
@click.option("--instances", default=1, show_default=True, help="Instances of each replica.")
@click.option("--balance", type=click.Choice([name for name in BALANCERS if name != "least-loaded"]), default="random")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(replicas: int, requests: int, each: float, instances: int, balance: str, as_json: bool) -> None:
    """Simulate a large fleet and print seconds and memory."""
    fleet = Fleet(
        staged(),
        Configuration(32, instances=instances),
        objective.parse("p99 < 10ms"),
        arrivals.POISSON,
        Balancer(balance, 10 * replicas),
        requests,
        cell=0,
    )
    begun, before = time.monotonic(), time.process_time()
    found = simulate(fleet, replicas, replicas * each)
    seconds, busy = time.monotonic() - begun, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if as_json:
        times = {key: found.latency_ms[key] for key in ("p50", "p99")}
        print(json.dumps({"replicas": replicas, "rate": each, "seconds": seconds, "GiB": peak, **times}))
        return
    print(f"{replicas:,} replicas, {requests:,} requests, {balance}, {each:g}/s each")
    print(f"counted behind the warm-up: {found.requests:,} requests")
    print(f"{seconds:.1f} s, of which {busy:.1f} s on a processor; at most {peak:.2f} GiB")
    times = ", ".join(f"{key} {found.latency_ms[key]:.2f} ms" for key in ("p50", "p99"))
    print(f"batch {found.batch:.2f}, utilization {found.utilization:.2f}, {times}")


if __name__ == "__main__":
    main()
