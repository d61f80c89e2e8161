"""What the embedded server costs: beside a backend that computes nothing, and beside the model in this process."""

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import saturation
import serving_peers

from optimize.predict.onnxruntime import OnnxPredictor
from serve.repository import source
from serve.server import tritonserver as server
from tuning import subjects
from tuning.ledger import Figures, Ledger, Rule

PAIRS, SECONDS, CONNECTIONS = 15, 3, 32
NOTHING = "nothing"
MLP_RATIO = "MLP over HTTP binary, over a backend that computes nothing"
TEXTS_RATIO = "MiniLM served over in-process"
WANTED = {f"{MLP_RATIO}, median of pairs": Rule("≥", 0.85), f"{TEXTS_RATIO}, median of pairs": Rule("≥", 0.95)}
COLUMNS = ("pair", "served", "beside", "ratio", "cores: model", "server", "client")
CONFIG = """backend: "python"
max_batch_size: 32
input { name: "x0" data_type: TYPE_FP32 dims: 784 }
output { name: "x3" data_type: TYPE_FP32 dims: 10 }
instance_group { count: 1 kind: KIND_CPU }
dynamic_batching { }
"""
MODEL = '''"""Answers every request with the same tensor, and looks at none of its own."""

import numpy as np
import triton_python_backend_utils as utils


class TritonPythonModel:
    def execute(self, requests):
        return [utils.InferenceResponse([utils.Tensor("x3", np.zeros((1, 10), np.float32))]) for _ in requests]
'''


def run(ledger: Ledger) -> None:
    """Measure the pairs of both, in turns."""
    keys = [f"{serving_peers.MLP}: {pair}" for pair in range(PAIRS)]
    if ledger.missing(keys):
        with both() as url:
            for key in keys:
                ledger.once(key, mlp_pair, url, int(key.rpartition(" ")[2]))
    made = subjects.subject(subjects.TEXTS)
    keys = [f"{subjects.TEXTS}: {pair}" for pair in range(PAIRS)]
    if ledger.missing(keys):
        with server.running(made.repository, models=[made.model]) as endpoint:
            for key in keys:
                ledger.once(key, texts_pair, endpoint, made.repository)


@contextmanager
def both() -> Iterator[str]:
    """Serve the small network and the backend that computes nothing by one server, and yield its URL."""
    with tempfile.TemporaryDirectory() as scratch:
        place, graph = Path(scratch, "repository"), Path(scratch, "mlp.onnx")
        place.mkdir()
        serving_peers.save_mlp(graph)
        # One thread, as `optimize run` has it for so small a model.
        words = ("--name", serving_peers.MLP, "--repository", str(place), "--set", "threads=1", "--no-check")
        subjects.run("serve", "add", str(graph), *words)
        home = place / NOTHING
        (home / "1").mkdir(parents=True)
        (home / "config.pbtxt").write_text(CONFIG)
        (home / "1" / "model.py").write_text(MODEL)
        with server.running(place) as endpoint:
            yield endpoint.http


def mlp_pair(url: str, pair: int) -> dict[str, float]:
    """Return requests per second of both, one after the other; who is first changes from pair to pair."""
    body = serving_peers.bodies(serving_peers.MLP)["binary"]
    other = serving_peers.Body(body.path.replace(serving_peers.MLP, NOTHING), body.data, body.headers)
    found = {}
    for name, asked in sorted({"served": body, "beside": other}.items(), reverse=bool(pair % 2)):
        serving_peers.drive(url, asked, CONNECTIONS, 1)
        found[name] = serving_peers.drive(url, asked, CONNECTIONS, SECONDS)["rate"]
    return found


def texts_pair(endpoint: Any, place: Path) -> dict[str, float]:
    """Return samples per second of the server under 64 connections, and of this process in batches as large."""
    seen = saturation.served(endpoint, subjects.TEXTS, place)
    found = source.load(place / subjects.TEXTS / "1", {})
    with OnnxPredictor(found.onnx, cores=len(os.sched_getaffinity(0))) as onnx:
        alone = saturation.alone(onnx, found.inputs, max(1, round(seen["batch"])))
    cores = {f"cores of the {party}": seen[party] for party in saturation.PARTIES}
    mine = {"cores in-process": alone["model"], "batch": seen["batch"]}
    return {"served": seen["rate"], "beside": alone["rate"], **cores, **mine}


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield each pair."""
    for key, cell in ledger.cells.items():
        yield {"pair": key, **cell, "ratio": cell["served"] / cell["beside"]}


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return the medians of the pairs, their range, and where the rest goes."""
    made: Figures = {}
    for name, model in ((MLP_RATIO, serving_peers.MLP), (TEXTS_RATIO, subjects.TEXTS)):
        pairs = [row for row in found if row["pair"].startswith(f"{model}: ")]
        if not pairs:
            continue
        ratios = sorted(row["ratio"] for row in pairs)
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        made |= {f"{name}, median of pairs": statistics.median(ratios), f"{name}, pairs": float(len(ratios))}
        made |= {f"{name}, a quarter is below": low, f"{name}, a quarter is above": high}
        for key in pairs[0]:
            if key.startswith("cores") or key == "batch":
                made[f"{name}: {key}"] = statistics.median(row[key] for row in pairs)
        if "cores in-process" in pairs[0]:
            each = [
                row["served"] / row["cores of the model"] / (row["beside"] / row["cores in-process"]) for row in pairs
            ]
            made[f"{name}: the same for each of the model's core-seconds"] = statistics.median(each)
    return made


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table."""
    for row in found:
        cores = (
            f"{row[f'cores of the {party}']:.2f}" if f"cores of the {party}" in row else ""
            for party in saturation.PARTIES
        )
        yield (row["pair"], f"{row['served']:.0f}", f"{row['beside']:.0f}", f"{row['ratio']:.3f}", *cores)
