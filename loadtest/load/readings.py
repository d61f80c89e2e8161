"""Readings: what the server's machine says of itself while a run goes on, about once a second.

From the server's own metrics where they can be reached: the machine's CPU and memory, its GPUs, and what the server has
spent on queueing and computing so far. And from the operating system where the server runs on this machine and we may
look at it: the CPU and memory of the process that listens on the port and of those that it started.
"""

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

from loadtest.load.metrics import MACHINE_USED, samples
from loadtest.load.processes import family, resident

EVERY = 1.0
"""Seconds between two readings."""
_PATIENCE = 2.0
_MICRO = 1e-6
_USUAL_PORTS, _METRICS_PORT = (8000, 8001), 8002

# By the metric's name: the key of our reading, and what to multiply with. Values of several models or GPUs are added,
# but for a utilization, of which the mean is taken.
_METRICS = {
    "nv_cpu_utilization": ("machine_cpu", 1.0),
    MACHINE_USED: ("machine_memory", 1.0),
    "nv_gpu_utilization": ("gpu", 1.0),
    "nv_gpu_memory_used_bytes": ("gpu_memory", 1.0),
    "nv_gpu_power_usage": ("gpu_watts", 1.0),
    "nv_inference_request_success": ("success", 1.0),
    "nv_inference_request_duration_us": ("request_s", _MICRO),
    "nv_inference_queue_duration_us": ("queue_s", _MICRO),
    "nv_inference_compute_input_duration_us": ("compute_input_s", _MICRO),
    "nv_inference_compute_infer_duration_us": ("compute_infer_s", _MICRO),
    "nv_inference_compute_output_duration_us": ("compute_output_s", _MICRO),
}


class Readings:
    """Reads, from the event loop, what can be read about the server at `url`.

    Args:
        url: the server's, as in the plan.
        models: whose figures are wanted; those of others are left out.
        metrics: `http://HOST:PORT` of the server's metrics; None tries 8002 for a server at 8000 or 8001.
    """

    def __init__(self, url: str, models: set[str], metrics: str | None = None) -> None:
        self.models = models
        self.place = metrics_place(url, metrics)
        self.wanted = metrics is not None
        self.processes = _processes(url)
        self._cpu, self._at = 0.0, 0.0
        self._read = False

    async def run(self, zero: float, write: Callable[[dict[str, Any]], None]) -> None:
        """Write a reading every second, the first one at the start of the run; ends when it is cancelled.

        Args:
            zero: the start of the run on the event loop's clock.
            write: takes a reading.
        """
        loop = asyncio.get_running_loop()
        due = max(zero, loop.time())
        while True:
            await asyncio.sleep(due - loop.time())
            values = self._of_processes() | await self._of_metrics()
            if values:
                self._read = True
                write({"reading": round(loop.time() - zero, 3), **values})
            due = max(due + EVERY, loop.time())

    def unknown(self) -> list[str]:
        """Return what could not be read during the run, in words."""
        return [] if self._read else ["the CPU and memory of the server's machine (no metrics; --metrics names them)"]

    async def _of_metrics(self) -> dict[str, float]:
        if not self.place:
            return {}
        try:
            async with asyncio.timeout(_PATIENCE):
                return parse(await _get(*self.place), self.models)
        except (OSError, TimeoutError, ValueError):
            if not self.wanted:
                self.place = None  # a guess that was wrong is not tried again
            return {}

    def _of_processes(self) -> dict[str, float]:
        if not self.processes:
            return {}
        before, then = self._cpu, self._at
        self._cpu, self._at = self._cpu_seconds(), time.monotonic()
        memory = float(resident(process.pid for process in self.processes))
        if not then:
            return {"server_memory": memory}
        # A process that ended takes its seconds along.
        return {"server_cpu": max(0.0, self._cpu - before) / (self._at - then), "server_memory": memory}

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self.processes:
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def metrics_place(url: str, metrics: str | None) -> tuple[str, int] | None:
    """Return host and port of the metrics: the named ones, or Triton's own where the server has Triton's own ports."""
    parts = urlsplit(metrics or url)
    if not parts.hostname or not parts.port:
        return None
    if metrics:
        return parts.hostname, parts.port
    # At any other port we would knock at the door of somebody else.
    return (parts.hostname, _METRICS_PORT) if parts.port in _USUAL_PORTS else None


async def _get(host: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode())
        answer = await reader.read(-1)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError("not the answer of a metrics port")
    return body.decode("utf-8", "replace")


def parse(text: str, models: set[str]) -> dict[str, float]:
    """Return a reading from a `/metrics` page of Triton.

    Args:
        text: the page, in Prometheus's text format.
        models: whose figures are added up.

    Raises:
        ValueError: the page has none of the metrics.
    """
    found: dict[str, list[float]] = {}
    for name, labels, value in samples(text, _METRICS):
        key, factor = _METRICS[name]
        model = labels.get("model")
        # A GPU that cannot say its power says NaN.
        if (model is None or model in models) and math.isfinite(value):
            found.setdefault(key, []).append(value * factor)
    if not found:
        raise ValueError("not the metrics of a Triton server")
    return {key: sum(values) / (len(values) if key == "gpu" else 1) for key, values in found.items()}


def _processes(url: str) -> list[psutil.Process]:
    """Return the process on this machine that listens at `url` and those that it started, as far as we may see them."""
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return []
    try:
        listening = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == parts.port and connection.pid
        ]
        if not listening:
            return []
        return [psutil.Process(pid) for pid in family(listening[0])]
    except (psutil.Error, OSError):
        return []
