"""perf_analyzer, the tensor load generator of Triton's makers, as a subprocess: for `benchmarks/load.py`."""

import csv
import json
import os
import resource
import subprocess
import tempfile
import time
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelathe.tensors import Arrays, packed

_TRIES = 3
HOME = Path(".venv-peers/perf_analyzer")
"""Where `make bench-loadtest` unpacks the binary and the CUDA library that it is linked against."""


def data_file(path: Path, payloads: Sequence[Arrays]) -> Path:
    """Write requests of one sample each in its JSON format."""
    rows = [
        {
            name: {"content": {"b64": b64encode(packed(array)).decode()}, "shape": list(array.shape[1:])}
            for name, array in inputs.items()
        }
        for inputs in payloads
    ]
    path.write_text(json.dumps({"data": rows}))
    return path


class Hangs(Exception):
    """It did not end in time: over HTTP it may hang, and its counting of many requests outlasts the load."""


def run(model: str, url: str, seconds: float, data: Path, *options: str) -> dict[str, Any]:
    """Drive an endpoint for about `seconds` and return rate, p50, p90 and p99 (ms), and the cores that it used.

    Raises:
        Hangs: it did not end, three times.
        RuntimeError: it wrote no figures.
    """
    for hung in range(_TRIES):
        try:
            return {**_once(model, url, seconds, data, *options), "hung": hung}
        except Hangs:
            print("perf_analyzer did not end; once more", flush=True)
    raise Hangs


def _once(model: str, url: str, seconds: float, data: Path, *options: str) -> dict[str, Any]:
    scheme, _, address = url.partition("://")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.csv"
        # Three windows without a demand for stability; fewer never report.
        command = [
            str(next(HOME.rglob("bin/perf_analyzer"))),
            "-m",
            model,
            "-u",
            address,
            "-i",
            scheme,
            "-f",
            str(file),
        ]
        command += ["-p", str(int(seconds * 1000 / 3)), "-s", "999", "-r", "3", "--input-data", str(data), *options]
        used, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        said = _end(
            subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True),
            seconds,
        )
        wall, now = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        if not file.exists():
            raise RuntimeError(f"perf_analyzer wrote no figures: {said[-400:]}")
        row = next(csv.DictReader(file.read_text().splitlines()))
    cores = (now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime) / wall
    times = {f"p{at}": float(row[f"p{at} latency"]) / 1000 for at in (50, 90, 99)}
    return {"rate": float(row["Inferences/Second"]), **times, "cores": cores, "warned": "delayed" in said}


def _end(process: "subprocess.Popen[str]", seconds: float) -> str:
    with process:
        try:
            return process.communicate(timeout=3 * seconds + 30)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise Hangs from None


def _environment() -> dict[str, str]:
    library = next(HOME.rglob("libcudart.so.12"), None)
    if library is None:
        raise SystemExit("perf_analyzer is not here; run `make bench-loadtest`")
    return {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
