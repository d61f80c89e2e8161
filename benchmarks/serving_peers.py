"""One endpoint, several servers: ours beside hand-written FastAPI, LitServe, MLServer and KServe's Python server.

Part of `make bench-serve`. The same ONNX files, bodies and load generator (wrk, one thread) for all; one server is up
at a time, started anew in every round. Prints the ratios of the rates within rounds and writes
build/bench/serving_peers.json.
"""

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import serving
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from optimize.judge import ruler
from optimize.judge.ruler import Ratio
from serve.server import tritonserver as server

OUTPUT = Path("build/bench")
SERVERS = Path("benchmarks/peer_servers")
ENVIRONMENTS = Path(".venv-servers")
MLP, TEXTS = "mlp", serving.TEXTS
TOKENS = 32
CONCURRENCIES = (1, 8, 32)
MLP_RATE = 11000
LONGEST = 600.0
"""Seconds beside one peer, after which there are no more rounds, if there were nine."""
SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
{headers}
done = function(summary, latency)
  local errors = summary.errors
  local failed = errors.status + errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format('{{"answers": %d, "microseconds": %d, "failed": %d, "p50": %g, "p99": %g}}\\n',
    summary.requests, summary.duration, failed, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


@dataclass(frozen=True)
class Body:
    """A request as bytes, and where it goes."""

    path: str
    data: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """How a server is started: the environment's program and its arguments, without port and models."""

    program: tuple[str, ...]
    raw: bool = False
    """Whether it also takes bare tensors."""


PEERS = {
    "fastapi": Peer(("fastapi/bin/python", "fastapi_server.py"), raw=True),
    "litserve": Peer(("litserve/bin/python", "litserve_server.py")),
    "kserve": Peer(("kserve/bin/python", "kserve_server.py")),
    "mlserver": Peer(("mlserver/bin/mlserver", "start")),
}


def save_mlp(path: Path) -> None:
    """Write a seeded network of 784-128-64-10 with a free batch axis."""
    widths, draw = (784, 128, 64, 10), np.random.default_rng(0)
    nodes, weights = [], []
    for at, (rows, columns) in enumerate(pairwise(widths)):
        weight = draw.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{at}"))
        nodes.append(helper.make_node("MatMul", [f"x{at}", f"w{at}"], [f"m{at}"]))
        nodes.append(helper.make_node("Relu", [f"m{at}"], [f"x{at + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("x0", widths[0]), ("x3", widths[-1]))
    ]
    graph = helper.make_graph(nodes, MLP, ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def tensors(model: str) -> dict[str, np.ndarray]:
    """Return one sample of the model's inputs."""
    draw = np.random.default_rng(1)
    if model == MLP:
        return {"x0": draw.random((1, 784), dtype=np.float32).round(4)}
    return {
        "input_ids": draw.integers(1000, 20000, (1, TOKENS)),
        "attention_mask": np.ones((1, TOKENS), np.int64),
    }


def bodies(model: str) -> dict[str, Body]:
    """Return the sample as V2 JSON, as V2 with binary tensors, and as bare bytes for a server that takes these."""
    sample, path = tensors(model), f"/v2/models/{model}/infer"
    entries = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": "FP32" if array.dtype == np.float32 else "INT64",
        }
        for name, array in sample.items()
    ]
    flat = [array.ravel() for array in sample.values()]
    data = [[round(float(value), 4) if array.dtype == np.float32 else int(value) for value in array] for array in flat]
    full = [entry | {"data": values} for entry, values in zip(entries, data, strict=True)]
    sized = [
        entry | {"parameters": {"binary_data_size": array.nbytes}} for entry, array in zip(entries, flat, strict=True)
    ]
    header = json.dumps({"inputs": sized, "parameters": {"binary_data_output": True}}).encode()
    bare = b"".join(array.tobytes() for array in flat)
    return {
        "json": Body(path, json.dumps({"inputs": full}).encode(), {"Content-Type": "application/json"}),
        "binary": Body(path, header + bare, {"Inference-Header-Content-Length": str(len(header))}),
        "raw": Body(f"/raw/{model}", bare),
    }


def ask(url: str, body: Body) -> np.ndarray:
    """Return the first output of one request."""
    request = urllib.request.Request(url + body.path, body.data, body.headers)  # noqa: S310 - a server of ours
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        content, start = answer.read(), answer.headers.get("Inference-Header-Content-Length")
    if body.headers.get("Content-Type") == "application/json":
        return np.array(json.loads(content)["outputs"][0]["data"], np.float32)
    return np.frombuffer(content[int(start or 0) :], np.float32)


def drive(url: str, body: Body, concurrency: int, seconds: int) -> dict[str, float]:
    """Return what wrk counted: requests a second, and milliseconds of the median and of the slowest in a hundred."""
    with tempfile.TemporaryDirectory() as scratch:
        data, script = Path(scratch) / "body", Path(scratch) / "load.lua"
        data.write_bytes(body.data)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in body.headers.items())
        script.write_text(SCRIPT.format(body=data, headers=headers))
        command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script)]
        said = subprocess.run([*command, url + body.path], check=True, capture_output=True, text=True).stdout
    told = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    if told["failed"]:
        raise SystemExit(f"{url}{body.path}: {told['failed']} requests failed")
    return {"rate": told["answers"] / told["microseconds"] * 1e6, "p50": told["p50"], "p99": told["p99"]}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def mlserver_folder(scratch: Path, graphs: dict[str, Any]) -> Path:
    """Write MLServer's own settings: adaptive batching, and no worker processes, which do not start with uvloop."""
    for model, extra in graphs.items():
        place = scratch / model
        place.mkdir()
        settings = {"name": model, "implementation": "mlserver_runtime.Served", "max_batch_size": 32}
        settings |= {"max_batch_time": 0.002, "parameters": {"extra": extra}}
        (place / "model-settings.json").write_text(json.dumps(settings))
    (scratch / "settings.json").write_text(json.dumps({"parallel_workers": 0, "debug": False}))
    return scratch


@contextmanager
def serving_peer(name: str, graphs: dict[str, Any]) -> Iterator[str]:
    """Start the peer's server in a session of its own; its URL."""
    peer, port = PEERS[name], free_port()
    program = [str(ENVIRONMENTS / peer.program[0])]
    variables = os.environ | {"PYTHONPATH": str(SERVERS.resolve())}
    with tempfile.TemporaryDirectory() as scratch:
        if name == "mlserver":
            program += [*peer.program[1:], str(mlserver_folder(Path(scratch), graphs))]
            ports = {"HTTP": port, "GRPC": free_port(), "METRICS": free_port()}
            variables |= {f"MLSERVER_{kind}_PORT": str(number) for kind, number in ports.items()}
        else:
            program += [str(SERVERS / peer.program[1]), str(port), json.dumps(graphs)]
        with Path(scratch, "log").open("wb") as log:
            process = subprocess.Popen(program, stdout=log, stderr=log, env=variables, start_new_session=True)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, Path(scratch, "log"))
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server says that it is ready, two minutes at most."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):  # noqa: S310
                return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise SystemExit(f"{url} did not start:\n{log.read_text()[-2000:]}")


def cells(peer: Peer) -> list[tuple[str, str, int]]:
    """Return what is measured beside this peer: model, form of the body, connections."""
    forms = ("json", "raw") if peer.raw else ("json",)
    return [(model, form, count) for model in (MLP, TEXTS) for form in forms for count in CONCURRENCIES]


def measure(place: Path, name: str, graphs: dict[str, Any], seconds: int) -> list[dict[str, Any]]:
    """Return what rounds showed of every cell beside one peer.

    In every round each server is started, asked in all cells and ended, one at a time, and the peer's twice: one that
    is started once has one luck for all rounds.
    """
    wanted = cells(PEERS[name])
    asked: dict[str, list[dict[str, Any]]] = {"ours": [], name: []}

    def visit(side: str) -> dict[Any, float]:
        with started(side, place, graphs) as url:
            answers = {cell: drive_cell(url, side == "ours", cell, seconds) for cell in wanted}
        asked[side].append(answers)
        return {cell: 1 / told["rate"] for cell, told in answers.items()}

    check(place, name, graphs)
    speeds = ruler.alternate(visit, ["ours", name], baseline=name, until=ruler.Until(seconds=LONGEST))
    found = []
    ratios, controls = speeds.ratios("ours", name), speeds.control()
    for cell in wanted:
        sides = {
            "ours" if side == "ours" else "theirs": [turn[cell] for turn in turns] for side, turns in asked.items()
        }
        model, form, concurrency = cell
        told = {"peer": name, "model": model, "form": form, "concurrency": concurrency, **sides}
        found.append({**told, "ratio": ratios[cell].document(), "control": controls[cell].document()})
        click.echo(f"{name} {model} {form} c{concurrency}: {ratios[cell]}, against itself {controls[cell]}")
    return found


@contextmanager
def started(side: str, place: Path, graphs: dict[str, Any]) -> Iterator[str]:
    """Start our server, or the peer of that name, and end it; its URL."""
    if side == "ours":
        with server.running(place) as endpoint:
            yield endpoint.http
    else:
        with serving_peer(side, graphs) as url:
            yield url


def body_of(ours: bool, model: str, form: str) -> Body:
    """Return the body that a side gets; what the peer takes as bare bytes, ours takes as binary tensors."""
    return bodies(model)["binary" if ours and form == "raw" else form]


def drive_cell(url: str, ours: bool, cell: tuple[str, str, int], seconds: int) -> dict[str, float]:
    """Return what wrk counted in one cell, after a second that does not count."""
    model, form, concurrency = cell
    drive(url, body_of(ours, model, form), concurrency, 1)
    return drive(url, body_of(ours, model, form), concurrency, seconds)


def check(place: Path, name: str, graphs: dict[str, Any]) -> None:
    """See that both sides answer the same, form by form."""
    kinds = dict.fromkeys((model, form) for model, form, _ in cells(PEERS[name]))
    answers = []
    for side in ("ours", name):
        with started(side, place, graphs) as url:
            answers.append([ask(url, body_of(side == "ours", model, form)) for model, form in kinds])
    for mine, theirs in zip(*answers, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def median(cell: dict[str, Any], side: str, what: str) -> float:
    """Return the median over the visits of one side's rate, p50 or p99."""
    return statistics.median(turn[what] for turn in cell[side])


def show(found: list[dict[str, Any]]) -> None:
    """Print each cell: both rates, the ratio with its interval, the peer against itself, and whether we are behind."""
    table = Table(title="beside other servers, requests a second (p99 ms)", title_justify="left")
    for title in ("model", "body", "connections", "peer", "ours", "theirs", "ratio", "control", ""):
        table.add_column(title, justify="right" if title in ("connections", "ours", "theirs", "ratio") else "left")
    for cell in found:
        ratio, control = (Ratio(*(cell[key][end] for end in ("value", "low", "high"))) for key in ("ratio", "control"))
        rates = [f"{median(cell, side, 'rate'):.0f} ({median(cell, side, 'p99'):.1f})" for side in ("ours", "theirs")]
        where = [cell["model"], cell["form"], str(cell["concurrency"]), cell["peer"]]
        verdict = "reached" if ratio.value >= 1 else "MISSED"
        table.add_row(*where, *rates, escape(str(ratio)), escape(str(control)), verdict)
    Console(width=120).print(table)
    best = [median(cell, "ours", "rate") for cell in found if (cell["model"], cell["form"]) == (MLP, "raw")]
    if best:
        verdict = "reached" if max(best) >= MLP_RATE else "MISSED"
        click.echo(f"the small network in binary: {max(best):.0f} requests a second, wanted {MLP_RATE}: {verdict}")


def publish(place: Path, model: str, onnx: Path) -> None:
    """Publish a file to our server, with what `serve add` chooses."""
    command = [sys.executable, "-m", "serve", "add", str(onnx), "--name", model, "--repository", str(place)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PEERS)))
@click.option("--seconds", default=2, help="Length of one load.")
def main(names: tuple[str, ...], seconds: int) -> None:
    """Measure our server beside each peer and print the ratios."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing; install it with: sudo apt-get install -y wrk")
    place, mlp = OUTPUT / "peers" / "model_repository", OUTPUT / "peers" / "mlp.onnx"
    place.mkdir(parents=True, exist_ok=True)
    graphs = {
        MLP: {"path": str(mlp), "threads": 1},
        TEXTS: {"path": str(place / TEXTS / "1" / "model.onnx"), "threads": 2},
    }
    if not (place / TEXTS).exists():
        serving.publish_texts(place)
    if not (place / MLP).exists():
        save_mlp(mlp)
        publish(place, MLP, mlp)
    found = []
    for name in names or PEERS:
        found += measure(place, name, graphs, seconds)
    (OUTPUT / "serving_peers.json").write_text(json.dumps({"date": time.strftime("%F"), "cells": found}, indent=2))
    show(found)


if __name__ == "__main__":
    main()
