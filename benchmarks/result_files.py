"""What a result file of a million requests costs to read: seconds and memory of each report.

The file is made up: times of a busy server, some failures, a reading each second.

    python benchmarks/result_files.py [REQUESTS]
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from loadtest.plan import Plan
from loadtest.results import Flight, Writer

RATE = 10_000.0
REPORTS = {
    "text": (),
    "--json": ("--json",),
    "--html": ("--html", "page.html"),
    "--csv": ("--csv", "rows.csv"),
}


def write(path: Path, requests: int) -> None:
    """Write a result file of so many requests."""
    rng = np.random.default_rng(0)
    plan = asdict(Plan("grpc://127.0.0.1:8001", requests / RATE, rate=RATE, workers=2))
    part = {"model": "made-up", "version": "1", "payloads": 16, "batch": 1, "tolerance": None}
    header = {"plan": plan, "parts": [part], "model": "made-up", "model_version": "1", "url": plan["url"]}
    late, service = rng.exponential(5e-5, requests), 0.003 * rng.lognormal(0, 0.4, requests)
    with Writer(path, header) as writer:
        for n in range(requests):
            due = n / RATE
            if n % RATE == 0:
                writer.reading({"reading": due, "server_cpu": 1.2, "server_memory": 2.1e8})
            failed = ("error", "HTTP 503: busy") if n % 1000 == 999 else ("ok", "")
            sent = due + float(late[n])
            writer.add(Flight(n, due, n % 16, sent, sent + float(service[n]), failed[0], failed[1]))
        end = {"end": requests / RATE + 0.1, "client_cpu": 0.8, "client_cores": 2, "gone": False, "errors": []}
        writer.finish(end)


def report(folder: Path, options: tuple[str, ...]) -> tuple[float, float, float]:
    """Return the wall seconds, CPU seconds and largest memory (MB) of one `loadtest report`."""
    command = [sys.executable, "-m", "loadtest", "report", str(folder / "run.jsonl")]
    command += [str(folder / option) if "." in option else option for option in options]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Print a row for each kind of report."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "run.jsonl", requests)
        size = (folder / "run.jsonl").stat().st_size / 1e6
        print(f"{requests:,} requests, {size:.0f} MB\n\nreport   seconds  CPU s  memory MB  written MB")
        for kind, options in REPORTS.items():
            wall, cpu, memory = report(folder, options)
            made = sum((folder / option).stat().st_size for option in options if "." in option) / 1e6
            print(f"{kind:8} {wall:7.2f} {cpu:6.2f} {memory:10.0f} {made:11.1f}", flush=True)


if __name__ == "__main__":
    main()
