"""No flight is lost: whatever a server answers, and whatever it leaves away, every request ends and is counted."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from loadtest.judge.summary import summarize
from loadtest.load import loop
from loadtest.plan.data.answers import Answers
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Chooser
from loadtest.record.results import DROPPED, ERROR, MISMATCH, OK, TIMEOUT, Flight, Writer, read
from loadtest.send import http2, wire
from modelathe.errors import BadInput
from modelathe.outputs import grpc_outputs
from tests.loadtest.peers import PARTS, flights, grpc_peer, http_peer, load, message, trailers

LIE = b"\x09\0\0\0a"
"""One string of nine bytes, of which one is there."""

OUTPUT = {"name": "y", "datatype": "BYTES", "shape": [1]}


def right() -> Answers:
    return Answers({0: ({"y": np.array([b"a"], object)}, 0.0)})


def strings(raw: bytes) -> bytes:
    """An HTTP answer with one output of strings."""
    output = OUTPUT | {"parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"outputs": [output]}).encode()
    sizes = f"Inference-Header-Content-Length: {len(head)}\r\nContent-Length: {len(head) + len(raw)}"
    return f"HTTP/1.1 200 OK\r\n{sizes}\r\n\r\n".encode() + head + raw


def response(raw: bytes) -> bytes:
    whole: bytes = service_pb2.ModelInferResponse(outputs=[OUTPUT], raw_output_contents=[raw]).SerializeToString()
    return whole


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (trailers(b"\xfe"), "cannot be read: InvalidTableIndex"),
        (trailers(http2.block([("grpc-status", "13"), ("grpc-message", "x" * 70_000)])), "cannot be read: Oversized"),
        (trailers(http2.block([("grpc-status", "²")])), "no gRPC"),
        (trailers(http2.block([("grpc-status", "-1")])), "no gRPC"),
        (trailers(b""), "no gRPC"),
        (lambda number: http2._frame(http2.DATA, http2.END_STREAM, number, b"x"), "an answer without headers"),
        (message(b"\xff\xff"), "not a ModelInferResponse"),
        (lambda number: message(b"ab")(number).replace(b"\0\0\0\0\2ab", b"\0\0\0\0\7ab"), "not one whole gRPC message"),
        (lambda number: message(b"ab")(number).replace(b"\0\0\0\0\2ab", b"\1\0\0\0\2ab"), "cannot be read: error"),
    ],
)
def test_a_malformed_answer_over_grpc_is_one_failure(answer: Any, said: str) -> None:
    found = load(grpc_peer(answer), "grpc", timeout=5.0)
    assert [(flight.verdict, flight.gone) for flight in found] == [(ERROR, False)] * 3
    assert all(said in flight.error and flight.done is not None for flight in found), found[0].error


def over_http(body: bytes, header: int | None = None) -> Any:
    size = f"Inference-Header-Content-Length: {len(body) if header is None else header}\r\n"
    return http_peer(f"HTTP/1.1 200 OK\r\n{size}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def over_grpc(**answer: Any) -> Any:
    return grpc_peer(message(service_pb2.ModelInferResponse(**answer).SerializeToString()))


FLOATS = {"name": "y", "datatype": "FP32", "shape": [2, 3]}
BRAIN = FLOATS | {"datatype": "BF16"}


def in_json(output: dict[str, Any]) -> Any:
    return over_http(json.dumps({"outputs": [output]}).encode())


HALF = json.dumps({"outputs": [OUTPUT | {"parameters": {"binary_data_size": 5}}]}).encode()


@pytest.mark.parametrize(
    ("scheme", "talk", "said"),
    [
        ("http", over_http(b'{"outputs":[]}'), "without outputs"),
        ("http", over_http(b'{"id":"\\"outputs\\""}'), "without outputs"),
        ("grpc", over_grpc(), "without outputs"),
        ("http", over_http(HALF), "0 bytes of outputs, 5 are described"),
        ("http", over_http(HALF + b"1234", len(HALF)), "4 bytes of outputs, 5 are described"),
        ("http", over_http(b'{"outputs":[3]}'), "cannot be read"),
        ("http", over_http(b'{"outputs":[{'), "cannot be read"),
        ("grpc", over_grpc(outputs=[OUTPUT] * 2, raw_output_contents=[b"\1\0\0\0a"]), "1 outputs, 2 are described"),
        ("http", in_json(OUTPUT), "'y' has 0 values, 1 are described"),
        ("http", in_json(OUTPUT | {"data": []}), "'y' has 0 values, 1 are described"),
        ("http", in_json(FLOATS | {"data": [[1.0, 2.0]]}), "'y' has 2 values, 6 are described"),
        ("http", in_json(OUTPUT | {"parameters": {"binary_data_size": 0}}), "'y' has 0 bytes, too few"),
        ("http", in_json(FLOATS | {"parameters": {"binary_data_size": 0}}), "'y' has 0 bytes, too few"),
        ("grpc", over_grpc(outputs=[OUTPUT]), "'y' has 0 values, 1 are described"),
        ("grpc", over_grpc(outputs=[FLOATS | {"contents": {"fp32_contents": [1.0]}}]), "1 values, 6 are described"),
        ("grpc", over_grpc(outputs=[FLOATS], raw_output_contents=[b""]), "'y' has 0 bytes, too few"),
        ("grpc", over_grpc(outputs=[FLOATS], raw_output_contents=[bytes(23)]), "'y' has 23 bytes, too few"),
        ("grpc", over_grpc(outputs=[OUTPUT], raw_output_contents=[b"\1\0\0"]), "'y' has 3 bytes, too few"),
        ("grpc", over_grpc(outputs=[OUTPUT], raw_output_contents=[LIE]), "'y' has 5 bytes, too few"),
        ("grpc", over_grpc(outputs=[OUTPUT], raw_output_contents=[bytes(8)]), "'y' has 8 bytes, too few or too many"),
        ("http", http_peer(strings(LIE)), "'y' has 5 bytes, too few"),
        ("grpc", over_grpc(outputs=[BRAIN], raw_output_contents=[bytes(5)]), "'y' has 5 bytes, too few"),
    ],
)
def test_half_an_answer_is_none_though_nobody_checks_its_values(scheme: str, talk: Any, said: str) -> None:
    for found in (load(talk, scheme, timeout=5.0), load(talk, scheme, Answers({1: ({}, 0.0)}), timeout=5.0)):
        assert [(flight.verdict, flight.gone) for flight in found] == [(ERROR, False)] * 3
        assert said in found[0].error


@pytest.mark.parametrize(
    ("scheme", "talk"),
    [
        ("http", in_json(FLOATS | {"data": [[1.0, 2.0, 3.0]] * 2})),
        ("http", in_json(FLOATS | {"shape": [0, 3], "data": []})),
        ("http", in_json(FLOATS | {"shape": [], "data": [1.0]})),
        ("http", in_json(FLOATS | {"shape": [0, 3], "parameters": {"binary_data_size": 0}})),
        ("grpc", over_grpc(outputs=[FLOATS | {"contents": {"fp32_contents": [0.0] * 6}}])),
        ("grpc", over_grpc(outputs=[FLOATS | {"shape": [0, 3]}])),
        ("grpc", over_grpc(outputs=[FLOATS], raw_output_contents=[bytes(24)])),
        ("grpc", over_grpc(outputs=[BRAIN], raw_output_contents=[bytes(12)])),
    ],
)
def test_every_value_that_is_described_is_there(scheme: str, talk: Any) -> None:
    assert [flight.verdict for flight in load(talk, scheme, timeout=5.0)] == [OK] * 3


@pytest.mark.parametrize(
    ("scheme", "talk"),
    [("http", http_peer(strings(LIE))), ("grpc", grpc_peer(message(response(LIE))))],
)
def test_strings_whose_length_lies_are_a_wrong_answer(scheme: str, talk: Any) -> None:
    answers = right()
    found = load(talk, scheme, answers, timeout=5.0)
    assert [(flight.verdict, flight.gone) for flight in found] == [(MISMATCH, False)] * 3
    assert "outputs cannot be read" in found[0].error
    assert (answers.checked, answers.samples[0]["n"], answers.samples[0]["expected"]) == (3, 0, "y")


@pytest.mark.parametrize(
    ("scheme", "talk"),
    [("http", http_peer(strings(b"\1\0\0\0a"))), ("grpc", grpc_peer(message(response(b"\1\0\0\0a"))))],
)
def test_strings_that_are_right_are_right(scheme: str, talk: Any) -> None:
    assert [flight.verdict for flight in load(talk, scheme, right(), timeout=5.0)] == [OK] * 3


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_from_the_check_of_an_answer(raw: bytes) -> None:
    answers, head = right(), strings(raw).partition(b"\r\n\r\n")[2][: -len(raw) or None]
    for decode in (
        lambda: wire.http_outputs(head, raw),
        lambda: grpc_outputs(service_pb2.ModelInferResponse.FromString(response(raw))),
    ):
        assert (answers.wrong(0, 0, raw, decode) == "") == (raw == b"\1\0\0\0a")


class Forgetful:
    """A sender that never ends every third flight, or every `each`-th."""

    finished: Any = None

    def __init__(self, each: int = 3) -> None:
        self.each = each

    async def open(self, connections: int) -> None: ...

    async def close(self) -> None: ...

    def start(self, zero: float) -> None:
        self.loop, self.zero = asyncio.get_running_loop(), zero

    def send(self, flight: Flight) -> None:
        flight.sent = self.loop.time() - self.zero
        if flight.n % self.each != self.each - 1:
            flight.done = flight.sent
            self.loop.call_soon(self.finished, flight)


@pytest.mark.parametrize(
    "how", [{"concurrency": 1}, {"concurrency": 1, "retries": 2}, {"rate": 200.0}, {"rate": 200.0, "in_flight": 2}]
)
def test_a_flight_that_its_sender_forgot_is_given_up(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "GRACE", 0.02)
    plan = Plan("http://h:1", 30.0, requests=9, timeout=0.02, warmup=0.0, **how)
    found = asyncio.run(asyncio.wait_for(flights(plan, Forgetful()), 20))
    assert sorted(flight.n for flight in found) == list(range(9))
    assert {flight.n: flight.verdict for flight in found} == {n: TIMEOUT if n % 3 == 2 else OK for n in range(9)}
    lost = [flight for flight in found if flight.verdict == TIMEOUT]
    assert all(flight.done and flight.sent is not None and flight.done - flight.sent > 0.04 for flight in lost)


def test_without_a_timeout_it_is_given_up_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PATIENCE", 0.05)
    plan = Plan("http://h:1", 0.2, concurrency=2, warmup=0.0)
    found = asyncio.run(asyncio.wait_for(flights(plan, Forgetful()), 20))
    assert [flight.verdict for flight in found].count(TIMEOUT) == 2


def dropped(rate: float, seconds: float) -> list[Flight]:
    """What is recorded of a run whose server is gone from the beginning."""
    found: list[Flight] = []
    run = loop.Loop(Plan("http://h:1", seconds, rate=rate), Forgetful(10**9), Chooser(PARTS, 0), seconds, found.append)
    run.gone = True
    asyncio.run(run.run(lambda progress: None))
    return found


def test_what_a_server_that_is_gone_did_not_get_is_one_record(tmp_path: Path) -> None:
    *sent, flight = dropped(10_000.0, 50.0)
    rest = 500_000 - len(sent)
    assert len(sent) < 1000  # what the first moment sent
    assert (flight.verdict, flight.n, flight.count, flight.until) == (DROPPED, len(sent), rest, 49.9999)
    assert flight.planned == pytest.approx(len(sent) / 10_000)
    header = {"plan": Plan("http://h:1", 50.0, rate=10_000.0).document(), "model": "m", "url": "u"}
    part = {"model": "m", "version": "1", "weight": 1.0, "payloads": 1, "batch": 1}
    with Writer(tmp_path / "r.jsonl", header | {"parts": [part]}) as writer:
        for one in (*sent, flight):
            writer.add(one)
    assert (tmp_path / "r.jsonl").stat().st_size < 3000 + 200 * len(sent)
    results = read(tmp_path / "r.jsonl")
    np.testing.assert_allclose(results.planned, np.arange(500_000) / 10_000, atol=1e-6)
    assert (results.of(OK).sum(), results.of(DROPPED).sum()) == (len(sent), rest)
    requests = summarize(tmp_path / "r.jsonl")["requests"]
    assert (requests["planned"], requests["sent"], requests["dropped"]) == (500_000, len(sent), rest)


def test_a_line_that_stands_for_no_request_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Writer(path, {"plan": {}, "model": "m", "url": "u"}) as writer:
        writer.add(Flight(0, 0.0, 0, verdict=DROPPED, count=2, until=1.0))
    path.write_text(path.read_text().replace('"count":2', '"count":0'))
    with pytest.raises(BadInput, match="line 2"):
        read(path)
