"""`loadtest mlperf` beside MLCommons' own LoadGen on the same endpoint: `python benchmarks/mlperf.py [URL MODEL]`.

Without an endpoint both drive a null server whose one instance holds every request for 10 ms, so that the queue is the
whole latency. They take turns; the table has the median of the rounds. Needs mlcommons-loadgen, part of the dev extra.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtest.selftest import nullserver

ROOT = Path(__file__).parent.parent
ROUNDS, SECONDS, QPS, SERVICE = 3, 10.0, 60.0, 0.01
SCENARIOS = ("single-stream", "multi-stream", "server", "offline")
SHARES = ("50.0%", "90.0%", "99.0%")


@contextmanager
def endpoint(args: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the URL and the model to drive."""
    if args:
        yield args[0], args[1]
        return
    with nullserver.running(service=SERVICE) as server:
        yield server.grpc, server.model


def ours(scenario: str, url: str, model: str) -> dict[str, float]:
    """Run `loadtest mlperf` and return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "loadtest", "mlperf", model, "--url", url, "--scenario", scenario, "--json"]
        command += ["--duration", f"{SECONDS:g}s", "--queries", "100", "--target-qps", f"{QPS:g}"]
        command += ["--target-latency", "1s", "--output", f"{folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:
        sys.exit(done.stderr)
    values = json.loads(done.stdout)
    if not values["run"]["valid"]:
        print(f"  (ours, {scenario}: {values['run']['why']})")
    found = {share: values["latency_s"][share] * 1e3 for share in SHARES}
    return found | _rate(scenario, values["metric"]["value"], values["latency_s"]["mean"])


def theirs(scenario: str, url: str, model: str) -> dict[str, float]:
    """Run LoadGen and return the same figures out of its summary."""
    asked = {"scenario": scenario, "url": url, "model": model, "duration": SECONDS, "queries": 100, "target_qps": QPS}
    command = [sys.executable, str(ROOT / "benchmarks" / "loadgen.py")]
    command.append(json.dumps(asked | {"target_latency": 1.0, "expected": SERVICE}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    summary = "\n".join(json.loads(done.stdout)["summary"])

    def said(pattern: str) -> float:
        match = re.search(pattern + r"\s*:\s*([\d.]+)", summary)
        assert match, summary
        return float(match[1])

    found = {share: said(rf"\b{float(share[:-1]):.2f} percentile latency \(ns\)") / 1e6 for share in SHARES}
    name = "Completed samples per second" if scenario == "server" else "Samples per second"
    metric = said(name) if scenario in ("server", "offline") else 0.0
    return found | _rate(scenario, metric, said(r"Mean latency \(ns\)") / 1e9)


def _rate(scenario: str, metric: float, mean: float) -> dict[str, float]:
    """Return what is done per second: the metric where it is one, else what the mean latency of one stream says."""
    return {"1/s": metric if scenario in ("server", "offline") else 1 / mean}


def main() -> None:
    """Print both, and ours over theirs."""
    with endpoint(sys.argv[1:]) as (url, model):
        print(f"{ROUNDS} rounds of {SECONDS:g} s each; latencies in ms\n")
        print(f"{'scenario':14}{'':9}" + "".join(f"{key:>10}" for key in (*SHARES, "1/s")))
        for scenario in SCENARIOS:
            rounds: list[tuple[Any, Any]] = [
                (ours(scenario, url, model), theirs(scenario, url, model)) for _ in range(ROUNDS)
            ]
            rows = [
                {key: statistics.median(row[side][key] for row in rounds) for key in rounds[0][0]} for side in (0, 1)
            ]
            rows.append({key: rows[0][key] / rows[1][key] for key in rows[0]})
            for name, row in zip(("modelathe", "LoadGen", "ratio"), rows, strict=True):
                print(f"{scenario:14}{name:9}" + "".join(f"{row[key]:10.3f}" for key in (*SHARES, "1/s")))


if __name__ == "__main__":
    main()
