"""Requests that are answered several times: when they are over, and when each response came."""

import asyncio
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtest.judge.summary import summarize
from loadtest.load import drive, eventloop
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import ERROR, MISMATCH, OK, TIMEOUT, Flight, Writer, read
from loadtest.send.stream import StreamSender
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import RequestRejected
from modelathe.outputs import FINAL
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.loadtest.peers import flights

COUNTS = [3, 1, 4]
CONFIG = """
name: "repeat"
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""


@pytest.fixture(scope="module")
def decoupled(server_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    repository = tmp_path_factory.mktemp("decoupled")
    (repository / "repeat" / "1").mkdir(parents=True)
    (repository / "repeat" / "config.pbtxt").write_text(CONFIG)
    shutil.copy(Path(__file__).with_name("decoupled_model.py"), repository / "repeat" / "1" / "model.py")
    with running(repository, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("wrong", [False, True])
def test_every_response_of_a_decoupled_model_is_timed_and_checked(
    decoupled: Endpoint, wrong: bool, tmp_path: Path
) -> None:
    payloads = [{"count": np.array([count], np.int32)} for count in COUNTS]
    right = [{f"y #{n + 1}" if n else "y": np.array([n], np.int32) for n in range(count)} for count in COUNTS]
    right[2]["y #4"] += wrong
    plan = Plan(decoupled.grpc, 60.0, concurrency=2, requests=30, warmup=0.0, connection=Connection(streams=2))
    drive.run(plan, [Part("repeat", payloads, tolerance=0.0, expected=right)], tmp_path / "r.jsonl")
    results, values = read(tmp_path / "r.jsonl"), summarize(tmp_path / "r.jsonl")
    np.testing.assert_array_equal(results.of(MISMATCH), (results.payload == 2) & wrong)
    assert (results.of(OK) | results.of(MISMATCH)).all(), values["errors"]
    responses = results.responses
    assert responses is not None
    for place, count in enumerate(np.array(COUNTS)[results.payload]):
        times = responses.at[responses.request == place]
        assert len(times) == count
        assert results.sent[place] < times[0]
        assert (np.diff(times) > 0).all()
        assert times[-1] <= results.done[place]
    mean = float(np.array(COUNTS)[results.payload].mean())
    assert values["responses"]["per_request"] == pytest.approx(mean)
    assert values["responses"]["first_ms"]["p50"] < values["latency_ms"]["p50"]


def test_without_a_stream_it_is_refused_with_the_way_out(decoupled: Endpoint) -> None:
    for url in (decoupled.grpc, decoupled.http):
        with connect(url, 10) as client, pytest.raises(RequestRejected, match="decoupled") as caught:
            client.infer("repeat", {"count": np.array([1], np.int32)})
        assert "--streams 1" in caught.value.fix


def test_a_single_question_gets_all_responses(decoupled: Endpoint) -> None:
    with connect(decoupled.grpc, 10, Connection(streams=1)) as client:
        for count in (2, 3):
            found = client.infer("repeat", {"count": np.array([count], np.int32)})
            assert [array.tolist() for array in found.values()] == [[n] for n in range(count)]


class Streaming:
    """A server that answers each request several times, and counts how many it has at work.

    Args:
        answers: of each request.
        last: how it says which is the last: in an `empty` one behind it, `with` it, or not at all (`unsaid`).
        garbage: the number of the response, of all, that is no message.
    """

    def __init__(self, answers: int, last: str, garbage: int = -1) -> None:
        self.answers, self.last, self.garbage = answers, last, garbage
        self.now = self.most = self.said = 0
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(64)

    def stream(self, requests: Iterator[Any], context: Any) -> Iterator[bytes]:
        came: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        context.add_callback(lambda: came.put(None))

        def read() -> None:
            try:
                for request in requests:
                    self.pool.submit(self.work, request.id, came)
            except grpc.RpcError:
                pass  # the client left

        threading.Thread(target=read, daemon=True).start()
        while (message := came.get()) is not None:
            yield message

    def work(self, name: str, came: "queue.SimpleQueue[bytes | None]") -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        for number in range(self.answers):
            time.sleep(0.005)
            final = number == self.answers - 1 and self.last == "with"
            if final:
                self.leave()
            came.put(self.message(name, final, [{"name": "y", "datatype": "FP32", "shape": [1]}]))
        if self.last != "with":
            self.leave()
        if self.last == "empty":
            came.put(self.message(name, True, []))

    def leave(self) -> None:
        with self.lock:
            self.now -= 1

    def message(self, name: str, final: bool, outputs: list[Any]) -> bytes:
        with self.lock:
            self.said += 1
            if self.said - 1 == self.garbage:
                return b"\xff\xff"
        response = service_pb2.ModelInferResponse(id=name, outputs=outputs)
        response.raw_output_contents.extend([bytes(4)] * len(outputs))
        if self.last != "unsaid":
            response.parameters[FINAL].bool_param = final
        whole: bytes = service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()
        return whole


@contextmanager
def serving(server: Streaming) -> Iterator[str]:
    rpc = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    read = service_pb2.ModelInferRequest.FromString
    calls = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(server.stream, read)}
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", calls),))
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        rpc.stop(0).wait()
        server.pool.shutdown()


def load(server: Streaming, duration: float = 60.0, **plan: Any) -> list[Flight]:
    request = service_pb2.ModelInferRequest(model_name="m").SerializeToString()

    async def main(url: str) -> list[Flight]:
        whole = Plan(url, duration, concurrency=2, warmup=0.0, connection=Connection(streams=1), **plan)
        sender = StreamSender(url, lambda flight: request, whole.timeout, None, whole.connection)
        try:
            return await asyncio.wait_for(flights(whole, sender), 30)
        finally:
            await sender.close()

    with serving(server) as url, asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
        return runner.run(main(url))


@pytest.mark.parametrize(("answers", "last"), [(5, "empty"), (5, "with"), (1, "empty"), (1, "with"), (1, "unsaid")])
def test_a_closed_loop_never_has_more_at_work_than_it_says(answers: int, last: str) -> None:
    server = Streaming(answers, last)
    found = load(server, requests=20)
    assert [flight.verdict for flight in found] == [OK] * 20
    assert server.most <= 2
    for flight in found:
        assert len(flight.responses) == (0 if (answers, last) in ((1, "with"), (1, "unsaid")) else answers)
        assert sorted(flight.responses) == list(flight.responses)
        assert flight.done is not None
        assert all(at <= flight.done for at in flight.responses)


def test_a_server_that_hides_which_answer_is_the_last_is_no_valid_load() -> None:
    server = Streaming(40, "unsaid")
    found = load(server, duration=1.0, timeout=0.2)
    taken = [flight for flight in found if flight.verdict == OK]
    # Until its second answer came, every first one looked like all of it.
    assert len(taken) < 20
    assert {flight.verdict for flight in found[len(taken) :]} == {TIMEOUT}
    assert "does not say which is the last" in found[-1].error


def test_a_message_that_cannot_be_read_ends_what_was_on_its_stream() -> None:
    found = load(Streaming(1, "with", garbage=7), requests=20)
    broken = [flight for flight in found if flight.verdict == ERROR]
    assert 1 <= len(broken) <= 2
    assert all("not a ModelStreamInferResponse" in flight.error for flight in broken)
    assert [flight.verdict for flight in found].count(OK) == 20 - len(broken)


def test_responses_come_back_from_a_file(tmp_path: Path) -> None:
    header = {"plan": Plan("http://h:1", 1.0, rate=1.0).document(), "model": "m", "url": "u", "parts": []}
    with Writer(tmp_path / "r.jsonl", header) as writer:
        many = Flight(1, 0.3, 0, 0.3, 0.9, responses=(0.5, 0.6, 0.8))
        rest = Flight(2, 1.0, 0, verdict="dropped", count=3, until=3.0)
        for flight in (rest, many, Flight(0, 0.2, 0, 0.2, 0.3), replace(many, n=5, planned=0.1)):
            writer.add(flight)
    results = read(tmp_path / "r.jsonl")
    assert results.planned.tolist() == [0.1, 0.2, 0.3, 1.0, 2.0, 3.0]
    assert results.responses is not None
    assert results.responses.request.tolist() == [0, 0, 0, 2, 2, 2]
    assert results.responses.at.tolist() == [0.5, 0.6, 0.8] * 2
