"""What an application sees while versions change, a backend process dies, and hours pass: `make bench-serve`.

Each part is a load test of the committed model beside something that happens to its server. Prints every figure beside
what is wanted and writes build/bench/serving.json.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import saturation
from rich.console import Console
from rich.table import Table

from loadtest.plan.data import payload
from loadtest.record import results
from optimize.predict.onnxruntime import OnnxPredictor
from serve.config import settings
from serve.repository import source, staging
from serve.repository import tree as repository
from serve.rollout import rollout
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint
from serve.watch import metrics
from serve.watch.healing import watching

OUTPUT = Path("build/bench")
COMMITTED, MODEL = Path("model_repository/digits_cnn/1"), "digits_cnn"
TEXTS = "sentence_embedding"
"""A model whose own time outweighs what a request costs the server."""
RATE, CHANGES = 200, 50
WANTED = {
    "50 changes of version: requests that failed": ("=", 0),
    "50 changes of version: wrong answers": ("=", 0),
    "process killed: seconds until right again": ("≤", 4.0),
    "process killed: wrong answers": ("=", 0),
    "half load: p99 over the time of a p99 batch here, delay off": ("≤", 3.0),
    "at saturation: served over in-process": ("≥", 0.95),
    "memory: growth after warm-up": ("≤", 0.02),
}


def add(place: Path, **asked: Any) -> None:
    """Publish the committed model as the next version, with settings, and make it live."""
    found = source.load(COMMITTED, {})
    assert found.target is not None
    made = settings.read(asked, "benchmark")
    with staging.stage(place, MODEL, found, found.target, made) as staged:
        staging.publish(staged, dict(found.lineage))
    rollout.promote(place, MODEL)


@contextmanager
def load(
    endpoint: Endpoint, model: Path, file: Path, seconds: float, rate: float, *options: str
) -> Iterator[dict[str, Any]]:
    """Send requests to a model of a repository at a rate from a process of its own; its report is there afterwards."""
    told: dict[str, Any] = {}
    command = [sys.executable, "-m", "loadtest", "run", model.name, "--url", endpoint.http, "--rate", str(rate)]
    command += ["--duration", f"{seconds:g}s", "--output", str(file), "--repository", str(model.parent)]
    command += [*options, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield told
        said, _ = process.communicate(timeout=seconds + 60)
        told.update(json.loads(said))
    finally:
        process.kill()
        process.wait()


def release(place: Path, seconds: float) -> dict[str, float]:
    """Change the live version 50 times between two configurations, under load."""
    file, took = OUTPUT / "release.jsonl", []
    with server.running(place) as endpoint, load(endpoint, place / MODEL, file, seconds, RATE) as told:
        time.sleep(3)
        for number in range(CHANGES):
            begun = time.perf_counter()
            rollout.promote(place, MODEL, number % 2 + 1, endpoint)
            took.append(time.perf_counter() - begun)
    if sum(took) + 3 > seconds:
        raise SystemExit(f"the changes took {sum(took):.0f} s, longer than the load; give --release-seconds")
    requests = told["requests"]
    return {
        "50 changes of version: requests that failed": requests["failed"] + requests["dropped"],
        "50 changes of version: wrong answers": requests["mismatched"],
        "50 changes of version: requests": requests["done"],
        "50 changes of version: seconds for one, median": statistics.median(took),
        "50 changes of version: p99, ms": told["latency_ms"]["p99"],
    }


def death(place: Path) -> dict[str, float]:
    """Kill the backend process under load, with the probe on, and see when answers are right again."""
    file = OUTPUT / "death.jsonl"
    with (
        server.running(place) as endpoint,
        watching(endpoint, place),
        load(endpoint, place / MODEL, file, 20, RATE) as told,
    ):
        time.sleep(6)
        killed = time.time()
        for pid in saturation.instances(endpoint):
            os.kill(pid, signal.SIGKILL)
    found = results.read(file)
    begun = killed - datetime.fromisoformat(found.header["clock_start"]).timestamp()
    bad = found.of("error", "timeout", "dropped")
    last = float(found.planned[bad].max()) if bad.any() else begun
    return {
        "process killed: seconds until right again": last - begun,
        "process killed: wrong answers": told["requests"]["mismatched"],
        "process killed: requests that failed": told["requests"]["failed"],
    }


def publish_texts(place: Path) -> None:
    """Make the sentence embedding in INT8 and publish it; a second time it comes from build/bench."""
    command = [sys.executable, "-m", "optimize", "run", f"examples/{TEXTS}.py:workload"]
    command += ["--recipe", f"examples/{TEXTS}.toml", "--output", str(OUTPUT / TEXTS), "--repository", str(place)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def half_load(place: Path) -> dict[str, float]:
    """Send Poisson arrivals at half of what the server holds, and compare p99 with the time of a large batch here."""
    with server.running(place, models=[TEXTS]) as endpoint:
        rate = 0.5 * most(endpoint, TEXTS, place)
        before = batches(endpoint, TEXTS)
        file = OUTPUT / "half.jsonl"
        with load(endpoint, place / TEXTS, file, 30, rate, "--arrival", "poisson") as told:
            pass
        counted = {size: count - before.get(size, 0) for size, count in batches(endpoint, TEXTS).items()}
    # The largest batch that all but one request in a hundred are within.
    sizes = np.repeat(list(counted), [size * count for size, count in counted.items()])
    large = int(np.percentile(sizes, 99, method="inverted_cdf"))
    delay = repository.config(place, TEXTS).dynamic_batching.max_queue_delay_microseconds / 1000
    alone = in_process(place / TEXTS / "1", large)
    return {
        "half load: p99 over the time of a p99 batch here, delay off": float(told["latency_ms"]["p99"] - delay) / alone,
        "half load: p99, ms": told["latency_ms"]["p99"],
        "half load: samples in a p99 batch": large,
        "half load: ms of such a batch here": alone,
        "half load: requests per second": rate,
    }


def most(endpoint: Endpoint, model: str, place: Path) -> float:
    """Return how many requests a second 32 connections get answered."""
    command = [sys.executable, "-m", "loadtest", "run", model, "--url", endpoint.http, "--concurrency", "32"]
    command += ["--repository", str(place), "--duration", "10s", "--json"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(told.stdout)["rate"]["achieved"])


def batches(endpoint: Endpoint, model: str) -> dict[int, int]:
    """Return how often the server has run each size of batch."""
    with urllib.request.urlopen(f"{endpoint.http}/v2/models/{model}/stats") as answer:  # noqa: S310 - our own server
        stats = json.load(answer)["model_stats"]
    return {
        entry["batch_size"]: entry["compute_infer"]["count"] for version in stats for entry in version["batch_stats"]
    }


def in_process(version: Path, batch: int) -> float:
    """Return the median milliseconds of a call with `batch` samples in this process."""
    found = source.load(version, {})
    inputs = payload.generate(found.inputs, 1, 0, batch=batch)[0]
    times = []
    with OnnxPredictor(found.onnx) as onnx:
        for _ in range(100):
            begun = time.perf_counter()
            onnx.predict(inputs)
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


def memory(place: Path, minutes: float) -> dict[str, float]:
    """Drive the server at 70 % of what it holds and compare its memory after a minute with that at the end."""
    with server.running(place, models=[MODEL]) as endpoint:
        rate = 0.7 * most(endpoint, MODEL, place)
        seen = []
        with load(endpoint, place / MODEL, OUTPUT / "memory.jsonl", 60 * minutes, rate):
            end = time.monotonic() + 60 * minutes - 1
            while time.monotonic() < end:
                time.sleep(5)
                seen.append(metrics.memory(endpoint.pid) or 0)
    warm, late = np.median(seen[12:18]), np.median(seen[-6:])
    return {
        "memory: growth after warm-up": float(late / warm - 1),
        "memory: MiB at the end": float(late / 2**20),
        "memory: minutes": minutes,
        "memory: requests per second": rate,
    }


def show(figures: dict[str, float]) -> None:
    """Print every figure, those with a limit beside it."""
    table = Table(title="serving", title_justify="left")
    for title in ("figure", "measured", "wanted", ""):
        table.add_column(title, justify="right" if title in ("measured", "wanted") else "left")
    for name, value in figures.items():
        sign, limit = WANTED.get(name, ("", 0))
        met = {"=": value == limit, "≤": value <= limit, "≥": value >= limit, "": True}[sign]
        verdict = "" if not sign else "reached" if met else "MISSED"
        table.add_row(name, f"{value:.4g}", f"{sign} {limit:g}" if sign else "", verdict)
    Console(width=110).print(table)


@click.command()
@click.option("--release-seconds", default=180.0, help="Length of the load under which versions change.")
@click.option("--minutes", default=30.0, help="Length of the load under which memory is watched; 2 at least.")
def main(release_seconds: float, minutes: float) -> None:
    """Measure every part and print the figures beside what is wanted."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model_repository"
        add(place)
        add(place, queue_delay_us=300, max_batch=16)
        figures |= release(place, release_seconds)
        figures |= death(place)
        publish_texts(place)
        figures |= half_load(place)
        figures |= saturation.measure(place, TEXTS)
        figures |= memory(place, minutes)
    (OUTPUT / "serving.json").write_text(json.dumps({"date": time.strftime("%F"), "figures": figures}, indent=2))
    show(figures)


if __name__ == "__main__":
    main()
