"""What HTTP/2 asks of a client: windows, limits of calls, farewells, and peers that speak something else."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from loadtest.judge.summary import summarize
from loadtest.load import drive, eventloop
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import ERROR, OK, TIMEOUT, Flight
from loadtest.selftest import nullserver
from loadtest.send import http2
from loadtest.send.grpc import GrpcSender
from modelathe.tensors import BATCH, TensorSpec

ANSWER = service_pb2.ModelInferResponse(
    outputs=[{"name": "y", "datatype": "FP32", "shape": [1]}], raw_output_contents=[bytes(4)]
).SerializeToString()


class Peer:
    """gRPC's own server; it answers after `seconds` and counts how many calls it has at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.most, self.now, self.lock = seconds, 0, 0, threading.Lock()

    def infer(self, request: bytes, context: Any) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        return ANSWER


@contextmanager
def serving(seconds: float = 0.0, **options: int) -> Iterator[tuple[str, Peer]]:
    peer = Peer(seconds)
    settings = [(f"grpc.{name}", value) for name, value in {"so_reuseport": 0, **options}.items()]
    server = grpc.server(ThreadPoolExecutor(32), options=settings)
    calls = {"ModelInfer": grpc.unary_unary_rpc_method_handler(peer.infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", calls),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}", peer
    finally:
        server.stop(0).wait()


def send(url: str, count: int, pause: float = 0.0, timeout: float | None = None, size: int = 10) -> list[Flight]:
    """Send so many calls, one after each pause, and return them when all have ended."""
    ended: list[Flight] = []

    async def main() -> None:
        sender = GrpcSender(url, lambda flight: bytes(size), timeout)
        sender.finished = ended.append
        await sender.open(1)
        sender.start(asyncio.get_running_loop().time())
        for n in range(count):
            sender.send(Flight(n, 0.0, 0))
            await asyncio.sleep(pause)
        while len(ended) < count:
            await asyncio.sleep(0.01)
        await sender.close()

    with asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
        runner.run(asyncio.wait_for(main(), 60))
    return ended


def test_large_messages_wait_for_the_window(tmp_path: Path) -> None:
    large = (TensorSpec("x", "float32", (BATCH, 1_000_000)),)
    answer = (TensorSpec("y", "float32", (BATCH, 1_000_000)),)
    with nullserver.running(inputs=large, outputs=answer) as server:
        parts = [Part(server.model, payload.generate(large, 3, 0), tolerance=0.0)]
        plan = Plan(server.grpc, 60.0, concurrency=4, requests=24, warmup=0.0)
        drive.run(plan, parts, tmp_path / "r.jsonl")
    values = summarize(tmp_path / "r.jsonl")
    assert values["requests"]["done"] == values["requests"]["planned"] == 24, values["errors"]


def test_no_more_calls_at_once_than_the_server_takes() -> None:
    with serving(0.01, max_concurrent_streams=2) as (url, peer):
        # The server's limit is known once its settings are here.
        ended = send(url, 20, pause=0.005)
    assert [flight.error for flight in ended if flight.verdict != OK] == []
    assert peer.most <= 2


def test_what_waits_for_the_servers_limit_is_its_service_time_and_no_lag_of_ours() -> None:
    with serving(0.02, max_concurrent_streams=1) as (url, _):
        ended = send(url, 12)
    took = [(flight.done or 0.0) - (flight.sent or 0.0) for flight in ended]
    assert [flight.verdict for flight in ended] == [OK] * 12
    assert took[-1] > 6 * took[0]
    assert max(flight.sent or 0.0 for flight in ended) < took[-1] / 2


def test_a_connection_that_the_server_retires_costs_no_request() -> None:
    with serving(0.005, max_connection_age_ms=200, max_connection_age_grace_ms=5000) as (url, _):
        ended = send(url, 300, pause=0.004)
    assert [flight.error for flight in ended if flight.verdict != OK] == []


def test_a_call_that_times_out_does_not_hold_up_others() -> None:
    with serving(0.5) as (url, _):
        ended = send(url, 3, timeout=0.1)
    assert [flight.verdict for flight in ended] == [TIMEOUT] * 3


def test_a_peer_that_speaks_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):  # one that opens beforehand, and one for the call
                connection, _ = listener.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        (flight,) = send(f"grpc://127.0.0.1:{listener.getsockname()[1]}", 1)
        thread.join()
    assert (flight.verdict, flight.gone) == (ERROR, True)
    assert "not HTTP/2" in flight.error


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"grpc://127.0.0.1:{listener.getsockname()[1]}"
    (flight,) = send(url, 1)
    assert (flight.verdict, flight.gone) == (ERROR, True)


@pytest.mark.parametrize("length", [0, 126, 127, 128, 254, 255, 20_000])
def test_headers_of_any_length(length: int) -> None:
    assert http2.fields(http2.block([("a", "b" * length), (":path", "/x")])) == {"a": "b" * length, ":path": "/x"}


def test_a_block_in_pieces_and_padding() -> None:
    found: list[tuple[list[bytes], bytes, str]] = []
    connection = http2.Http2(lambda connection, calls: None)

    class Transport:
        def write(self, data: bytes) -> None: ...

    connection.connection_made(Transport())  # type: ignore[arg-type]
    connection.start(http2.Call(b"", b"", lambda call, error: found.append((call.blocks, bytes(call.body), error))))
    frames = [
        http2._frame(http2.SETTINGS, 0, 0, b""),
        http2._frame(http2.HEADERS, http2.PADDED, 1, b"\x02ab??"),
        http2._frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"cd"),
        http2._frame(http2.DATA, http2.PADDED, 1, b"\x01body?"),
        http2._frame(http2.HEADERS, http2.END_STREAM | http2.END_HEADERS | http2.PRIORITY, 1, b"....." + b"ef"),
    ]
    for byte in b"".join(frames):
        connection.get_buffer(1)[0] = byte
        connection.buffer_updated(1)
    assert found == [([b"abcd", b"ef"], b"body", "")]
