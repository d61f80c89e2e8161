"""What `/metrics` says, from two pages of a real server: 400 requests of two rows lie between them."""

import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from loadtest.load.metrics import MACHINE_USED
from loadtest.load.processes import family
from modelathe.errors import ServerAbsent, ServerNonsense, UsageError
from serve.server.endpoint import Endpoint
from serve.watch import metrics
from tests.conftest import TINY

FIRST, SECOND = ((Path(__file__).parent / "recorded" / f"metrics-{n}.txt").read_text() for n in (1, 2))
QUIET = dict.fromkeys(("OTHER", "BACKEND", "CANCELED", "REJECTED"), 0.0)


def between(first: str, second: str, seconds: float = 4) -> list[metrics.Rates]:
    return metrics.between(metrics.parse(first, 10), metrics.parse(second, 10 + seconds))


def test_rates_of_recorded_pages() -> None:
    (rates,) = between(FIRST, SECOND)
    assert (rates.model, rates.version, rates.requests, rates.pending) == (TINY, "1", 100, 0)
    assert rates.batch == 800 / 308
    assert rates.queue_ms == pytest.approx((114921 - 413) / 400 / 1000)
    assert rates.compute_ms == pytest.approx(0.650525)
    assert rates.quantiles_ms == {"0.5": 0.864, "0.9": 2.134, "0.95": 3.07, "0.99": 3.088, "0.999": 3.228}
    assert rates.failures == QUIET
    assert metrics.parse(SECOND, 0).machine[MACHINE_USED] == 744374272


def test_nothing_happened() -> None:
    (rates,) = between(SECOND, SECOND)
    assert (rates.requests, rates.failures) == (0, QUIET)
    assert math.isnan(rates.batch)
    assert math.isnan(rates.queue_ms)
    assert math.isnan(rates.compute_ms)


def test_failures_by_reason() -> None:
    failed = SECOND.replace('reason="REJECTED",version="1"} 0', 'reason="REJECTED",version="1"} 8')
    assert between(FIRST, failed)[0].failures == QUIET | {"REJECTED": 2}


@pytest.mark.parametrize("first", [SECOND, "", FIRST.replace(f'"{TINY}"', '"gone"')])
def test_a_model_that_was_loaded_in_between_counts_from_zero(first: str) -> None:
    (rates,) = between(first, FIRST)
    assert (rates.model, rates.requests, rates.batch) == (TINY, 33 / 4, 33 / 2)


def test_versions_are_in_order() -> None:
    pages = [FIRST.replace('version="1"', f'version="{number}"') for number in (10, 9)]
    assert [rates.version for rates in between(FIRST, "\n".join(pages))] == ["9", "10"]


def test_an_empty_summary_has_no_quantiles() -> None:
    idle = SECOND.replace('quantile="0.99"} 3088', 'quantile="0.99"} Nan')
    assert math.isnan(between(FIRST, idle)[0].quantiles_ms["0.99"])


@pytest.mark.parametrize("url", ["127.0.0.1:8002", "http://127.0.0.1:8002", "http://127.0.0.1:8002/metrics"])
def test_addresses(url: str) -> None:
    assert metrics.address(url) == "127.0.0.1:8002"


@pytest.mark.parametrize("url", ["", "localhost", "grpc://127.0.0.1:8001", "https://x:1", "http://x:1/v2", "x:99999"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError):
        metrics.address(url)


@contextmanager
def saying(text: str) -> Iterator[str]:
    """Yield the address of an HTTP server that answers everything with `text`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("text", ["", "<html>hello</html>", "# TYPE go_threads gauge\ngo_threads 7\n", "nv_x{"])
def test_what_is_not_a_triton_server(text: str) -> None:
    with saying(text) as place, pytest.raises(ServerNonsense, match="not the metrics of a Triton server"):
        metrics.fetch(place)


def test_nothing_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ServerAbsent, match="nothing answers: Connection refused"):
            metrics.fetch(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_real_server_says_all_that_is_read(endpoint: Endpoint) -> None:
    scrape = metrics.fetch(metrics.address(endpoint.metrics))
    said = {name for name, _ in scrape.models[TINY, "1"]}
    read = {metrics.SUCCESS, metrics.FAILURE, metrics.INFERENCES, metrics.EXECUTIONS, metrics.QUEUE, metrics.PENDING}
    assert read | {*metrics.COMPUTE.values(), metrics.LATENCY} <= said
    assert {MACHINE_USED, metrics.MACHINE_TOTAL} <= scrape.machine.keys()
    below = family(endpoint.pid)
    assert any(b"stub" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below)
    assert (metrics.memory(endpoint.pid) or 0) > 2**20


def test_the_memory_of_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in family(os.getpid())
    assert family(process.pid) == []
    assert metrics.memory(process.pid) is None
