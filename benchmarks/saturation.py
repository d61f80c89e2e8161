"""Served over in-process at saturation, and who had the cores meanwhile: a part of `make bench-serve`.

Drives a model behind a server and the same file in this process, in the same rounds, with the same cores and the batch
that the server formed on average.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import beside

from modelathe.tensors import TensorSpec
from optimize.predict.onnxruntime import OnnxPredictor
from serve.repository import source
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint

CONNECTIONS, SECONDS = 64, 9
BEGIN, WATCHED = 4.0, 4.0
"""The client has started and warmed up after BEGIN seconds; the cores are watched for WATCHED seconds from then."""
PARTIES = ("model", "server", "client")
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def instances(endpoint: Endpoint) -> list[int]:
    """Return the process ids of the models' instances."""
    children = Path(f"/proc/{endpoint.pid}/task/{endpoint.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def served(endpoint: Endpoint, model: str, place: Path) -> dict[str, float]:
    """Drive the endpoint from a process of its own: requests a second, mean batch, and the cores each party had."""
    command = [sys.executable, "-m", "loadtest", "run", model, "--url", endpoint.http, "--repository", str(place)]
    command += ["--concurrency", str(CONNECTIONS), "--duration", f"{SECONDS}s", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as client:
        parties = {"model": instances(endpoint), "server": [endpoint.pid], "client": [client.pid]}
        time.sleep(BEGIN)
        before, begun = {name: sum(map(cpu_seconds, pids)) for name, pids in parties.items()}, time.perf_counter()
        time.sleep(WATCHED)
        wall = time.perf_counter() - begun
        cores = {name: (sum(map(cpu_seconds, pids)) - before[name]) / wall for name, pids in parties.items()}
        told = json.loads(client.communicate()[0])
    return {"rate": told["rate"]["achieved"], "batch": told["server"]["mean_batch"], **cores}


def alone(onnx: OnnxPredictor, inputs: Sequence[TensorSpec], batch: int) -> dict[str, float]:
    """Run back-to-back calls in this process: samples a second, and the cores that they had."""
    cpu, begun = time.process_time(), time.perf_counter()
    rate = beside.in_process(onnx, inputs, batch)
    return {"rate": rate, "model": (time.process_time() - cpu) / (time.perf_counter() - begun)}


def measure(place: Path, model: str) -> dict[str, float]:
    """Return the ratio over rounds, each with a server of its own, and the medians of what else they showed."""
    found = source.load(place / model / "1", {})
    target = found.target
    assert target is not None

    def through() -> dict[str, float]:
        with server.running(place, models=[model]) as endpoint:
            return served(endpoint, model, place)

    def here(batch: int) -> dict[str, float]:
        with OnnxPredictor(found.onnx, cores=target.cores) as onnx:
            return alone(onnx, found.inputs, batch)

    told = beside.measure(through, here)
    print(beside.line(model, told))
    return figures(told)


def figures(told: dict[str, Any]) -> dict[str, float]:
    """Return the figures of what `beside.measure` found."""

    def median(side: str, key: str) -> float:
        return statistics.median(turn[key] for turn in told["turns"][side])

    def per_core(side: str) -> float:
        return statistics.median(turn["rate"] / turn["model"] for turn in told["turns"][side])

    ratio, control = told["ratio"], told["control"]
    return {
        **{f"at saturation: cores of the {party}": median(beside.SERVED, party) for party in PARTIES},
        "at saturation: samples in a mean batch": median(beside.SERVED, "batch"),
        "at saturation: cores of the model, in-process": median(beside.ALONE, "model"),
        "at saturation: served over in-process": ratio["value"],
        "at saturation: served over in-process, low end of the interval": ratio["low"],
        "at saturation: served over in-process, high end of the interval": ratio["high"],
        "at saturation: served over served again": control["value"],
        "at saturation: the same for each of the model's core-seconds": per_core(beside.SERVED)
        / per_core(beside.ALONE),
    }
