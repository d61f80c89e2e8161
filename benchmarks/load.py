"""The load generator beside perf_analyzer, and against servers that compute nothing: `make bench-loadtest`.

Both generators in turn, the order changing from pair to pair. Prints every figure beside what is wanted and writes
build/bench/load.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import perf_analyzer
from rich.console import Console
from rich.table import Table
from serving import TEXTS, publish_texts

from loadtest.plan.data import payload
from loadtest.selftest import nullserver
from modelathe.tensors import Arrays
from serve.repository import source
from serve.server import tritonserver as server

OUTPUT = Path("build/bench")
Figures = dict[str, float]
Turn = dict[str, Any]
WANTED: dict[str, tuple[str, float]] = {
    "MiniLM: requests per second over theirs": ("±", 0.05),
    "MiniLM: p50 over theirs": ("±", 0.05),
    "stall: p50 over the truth": ("±", 0.1),
    "stall: p99 over the truth": ("±", 0.1),
    "HTTP: requests per second and client core": ("≥", 25_000),
    "HTTP: per client core over theirs": ("≥", 2.0),
    "gRPC: per client core over their sync mode": ("≥", 0.8),
    "a million requests: MiB of the client": ("≤", 200),
    "a million requests: seconds to report on them": ("≤", 5.0),
}


def ours(model: str, url: str, seconds: float, *options: str) -> Turn:
    """Drive an endpoint from a process of its own and return the same figures as `perf_analyzer.run`."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "loadtest",
            "run",
            model,
            "--url",
            url,
            "--duration",
            f"{seconds:g}s",
            "--json",
        ]
        command += ["--output", f"{scratch}/load.jsonl", *options]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    times = {name: told["latency_ms"][name] for name in ("p50", "p90", "p99")}
    return {"rate": told["rate"]["achieved"], **times, "cores": told["client_cpu"], "why": told["why"]}


def turns(pairs: int, sides: dict[str, Callable[[], Turn]]) -> list[dict[str, Turn]]:
    """Run every side once for each pair, in changing order."""
    found = []
    for number in range(pairs):
        order = sorted(sides, reverse=number % 2 == 1)
        found.append({name: sides[name]() for name in order})
        print(", ".join(f"{name} {found[-1][name]['rate']:.0f}/s" for name in sides), flush=True)
    return found


def ratio(found: Sequence[dict[str, Turn]], key: str, above: str, below: str) -> float:
    """Return the median over pairs of one side's figure over the other's."""
    return statistics.median(pair[above][key] / pair[below][key] for pair in found)


def per_core(turn: Turn) -> float:
    """Return the requests a second for each core that the client used."""
    return float(turn["rate"] / turn["cores"])


def requests_of(version: Path, folder: Path) -> tuple[list[Arrays], Path, Path]:
    """Return 16 requests, and the same as a file for each generator."""
    made = payload.generate(source.load(version, {}).inputs, 16, 0)
    raw = {name: [inputs[name][0] for inputs in made] for name in made[0]}
    np.savez(folder / "requests.npz", **{name: np.stack(arrays) for name, arrays in raw.items()})
    return made, folder / "requests.npz", perf_analyzer.data_file(folder / "requests.json", made)


def agreement(pairs: int, seconds: float) -> tuple[Figures, Any]:
    """Compare the two on MiniLM behind the real server, closed loop of 8 over gRPC."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model_repository"
        publish_texts(place)
        _, npz, data = requests_of(place / TEXTS / "1", Path(scratch))
        with server.running(place, models=[TEXTS]) as endpoint:
            sides = {
                "modelathe": lambda: ours(TEXTS, endpoint.grpc, seconds, "--concurrency", "8", "--data", str(npz)),
                "perf_analyzer": lambda: perf_analyzer.run(
                    TEXTS, endpoint.grpc, seconds, data, "--concurrency-range", "8"
                ),
            }
            found = turns(pairs, sides)
    theirs = [pair["perf_analyzer"]["p99"] for pair in found]
    return {
        "MiniLM: requests per second over theirs": ratio(found, "rate", "modelathe", "perf_analyzer"),
        "MiniLM: p50 over theirs": ratio(found, "p50", "modelathe", "perf_analyzer"),
        "MiniLM: p99, ms": statistics.median(pair["modelathe"]["p99"] for pair in found),
        "MiniLM: their smallest p99, ms": min(theirs),
        "MiniLM: their largest p99, ms": max(theirs),
    }, found


def stall(seconds: float) -> tuple[Figures, Any]:
    """Compare what the two say of a server that stands still for a second at each hundredth request."""
    figures: Figures = {}
    truth = waiting(0.005, 1.0, 100, 50, seconds)
    with nullserver.running(service=0.005, stall=1.0, each=100) as null, tempfile.TemporaryDirectory() as scratch:
        _, _, data = null_requests(Path(scratch))
        rate = ("--request-rate-range", "50")
        told = {
            "modelathe": ours(null.model, null.grpc, seconds, "--rate", "50", "--warmup", "0s"),
            "perf_analyzer": perf_analyzer.run(null.model, null.grpc, seconds, data, *rate),
            "perf_analyzer --async": perf_analyzer.run(null.model, null.grpc, seconds, data, *rate, "--async"),
        }
    for name in ("p50", "p90", "p99"):
        figures[f"stall: {name} of the truth, ms"] = truth[name]
        for side, turn in told.items():
            figures[f"stall: {name} of {side}, ms"] = turn[name]
    for name in ("p50", "p99"):
        figures[f"stall: {name} over the truth"] = told["modelathe"][name] / truth[name]
    return figures, told


def waiting(service: float, stall: float, each: int, rate: float, seconds: float) -> Figures:
    """Return the latencies (ms), from the planned times, of evenly spaced requests at one server with these times."""
    free, latencies = 0.0, []
    for n in range(int(rate * seconds)):
        planned = n / rate
        free = max(free, planned) + service + (stall if (n + 1) % each == 0 else 0.0)
        latencies.append(free - planned)
    return {f"p{at}": float(np.percentile(latencies, at, method="inverted_cdf")) * 1000 for at in (50, 90, 99)}


def null_requests(folder: Path) -> tuple[list[Arrays], Path, Path]:
    """Return 16 requests for the null server's model, and the same as a file for perf_analyzer."""
    made = payload.generate(nullserver.INPUTS, 16, 0)
    return made, folder, perf_analyzer.data_file(folder / "requests.json", made)


def ceiling(pairs: int, seconds: float) -> tuple[Figures, Any]:
    """Compare the requests per second and client core of the two against a server that computes nothing."""
    with nullserver.running() as null, tempfile.TemporaryDirectory() as scratch:
        _, _, data = null_requests(Path(scratch))

        def theirs(url: str, *options: str) -> Callable[[], Turn]:
            return lambda: perf_analyzer.run(null.model, url, seconds, data, "--concurrency-range", "8", *options)

        def mine(url: str) -> Callable[[], Turn]:
            return lambda: ours(null.model, url, seconds, "--concurrency", "8", "--allow-invalid")

        http = turns(pairs, {"modelathe": mine(null.http), "perf_analyzer": theirs(null.http, "--sync")})
        sides = {
            "modelathe": mine(null.grpc),
            "sync": theirs(null.grpc, "--sync"),
            "async": theirs(null.grpc, "--async"),
        }
        grpc = turns(pairs, sides)
    for pair in [*http, *grpc]:
        for turn in pair.values():
            turn["per_core"] = per_core(turn)
    return {
        "HTTP: requests per second and client core": statistics.median(pair["modelathe"]["per_core"] for pair in http),
        "HTTP: per client core over theirs": ratio(http, "per_core", "modelathe", "perf_analyzer"),
        "gRPC: requests per second and client core": statistics.median(pair["modelathe"]["per_core"] for pair in grpc),
        "gRPC: per client core over their sync mode": ratio(grpc, "per_core", "modelathe", "sync"),
        "gRPC: per client core over their async mode": ratio(grpc, "per_core", "modelathe", "async"),
    }, {"http": http, "grpc": grpc}


def million(count: int) -> tuple[Figures, Any]:
    """Send a million requests, watch the client's memory, and time the report."""
    figures: Figures = {}
    with nullserver.running() as null, tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "load.jsonl"
        command = [sys.executable, "-m", "loadtest", "run", null.model, "--url", null.http, "--duration", "600s"]
        command += ["--requests", str(count), "--output", str(file), "--json", "--allow-invalid"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
            sending = 0
            while client.poll() is None:
                seen = resident(client.pid)
                # What the report needs at the end is not the run's.
                if file.exists() and not ended(file):
                    sending = max(sending, seen)
                time.sleep(0.1)
        begun = time.perf_counter()
        report = [sys.executable, "-m", "loadtest", "report", str(file), "--html", f"{scratch}/page.html", "--json"]
        told = json.loads(subprocess.run(report, capture_output=True, text=True, check=False).stdout)
        figures["a million requests: sent"] = told["requests"]["sent"]
        figures["a million requests: MiB of the client"] = sending / 2**20
        figures["a million requests: seconds to report on them"] = time.perf_counter() - begun
    return figures, None


def resident(pid: int) -> int:
    """Return the bytes of memory that a process holds; 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def ended(file: Path) -> bool:
    """Whether the last line of a result file is there."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 4096))
        return b'"end":' in stream.read()


def show(figures: Figures) -> bool:
    """Print every figure, those with a limit beside it; whether all limits were kept."""
    table, missed = Table(title="load generator", title_justify="left"), False
    for title in ("figure", "measured", "wanted", ""):
        table.add_column(title, justify="right" if title in ("measured", "wanted") else "left")
    for name, value in figures.items():
        sign, limit = WANTED.get(name, ("", 0.0))
        met = {"±": abs(value - 1) <= limit, "≤": value <= limit, "≥": value >= limit, "": True}[sign]
        missed |= not met
        wanted = f"1 ± {limit:g}" if sign == "±" else f"{sign} {limit:g}" if sign else ""
        table.add_row(
            name,
            f"{value:,.4g}" if value < 1000 else f"{value:,.0f}",
            wanted,
            "" if not sign else "reached" if met else "MISSED",
        )
    Console(width=110).print(table)
    return not missed


PARTS: dict[str, Callable[[int, float], tuple[Figures, Any]]] = {
    "agreement": agreement,
    "stall": lambda pairs, seconds: stall(6 * seconds),
    # At such rates perf_analyzer's counting of 6 s takes it most of a minute.
    "ceiling": lambda pairs, seconds: ceiling(pairs, seconds / 2),
    "million": lambda pairs, seconds: million(1_000_000),
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--pairs", default=7, show_default=True, help="Turns of every comparison.")
@click.option("--seconds", default=6.0, show_default=True, help="Length of one side of a turn.")
def main(names: tuple[str, ...], pairs: int, seconds: float) -> None:
    """Measure the parts that NAMES lists, or all of them."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    figures: Figures = {}
    raw: dict[str, Any] = {}
    for name in names or PARTS:
        found, raw[name] = PARTS[name](pairs, seconds)
        figures |= found
        document = {"date": time.strftime("%F"), "figures": figures, "turns": raw}
        (OUTPUT / "load.json").write_text(json.dumps(document, indent=2))
    show(figures)


if __name__ == "__main__":
    main()
