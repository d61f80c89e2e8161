"""How answers over HTTP/1.1 are read: whole, in pieces, and beside another implementation (h11)."""

import asyncio
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, cast
from unittest import mock

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.plan.plan import Plan
from loadtest.record.results import ERROR, OK, TIMEOUT, Flight
from loadtest.send import http
from loadtest.send.http import HttpSender
from tests.loadtest.peers import flights, http_peer, load

BODY = b'{"outputs":[{"name":"y","datatype":"FP32","shape":[1],"data":[0]}]}'


class Answer(NamedTuple):
    """What was understood of an answer; without a status it was none."""

    status: int | None
    body: bytes = b""
    fields: dict[bytes, bytes] = {}  # noqa: RUF012 -- nobody changes it


@dataclass
class Line:
    """One connection of a sender, without a network: bytes go in by hand."""

    ended: list[Answer] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.sender = HttpSender("h:1", lambda flight: b"", None)
        self.sender.loop = mock.Mock(time=lambda: 0.0)
        self.sender.finished = self._finished
        self.connection = http._Connection(self.sender)
        transport = mock.Mock(is_closing=lambda: self.closed)
        transport.abort.side_effect = self._close
        self.connection.connection_made(transport)

    def ask(self) -> None:
        self.sender.idle.clear()
        self.connection.send(Flight(len(self.flights), 0.0, 0))

    def hear(self, pieces: Sequence[bytes], end: bool = False) -> None:
        """Take bytes piece by piece, at the end also that of the connection, as an event loop would."""

        def judge(answers: Any, flight: Flight, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
            self.ended.append(Answer(status, body, fields))

        with mock.patch.object(http, "_judge", judge):
            for piece in pieces:
                if piece and not self.closed:
                    self.connection.get_buffer(-1)[: len(piece)] = piece
                    self.connection.buffer_updated(len(piece))
            if end:
                self.closed = True
            if self.closed:
                self.connection.connection_lost(None)

    @property
    def reusable(self) -> bool:
        return self.connection in self.sender.idle

    def _close(self) -> None:
        self.closed = True

    def _finished(self, flight: Flight) -> None:
        if len(self.ended) == len(self.flights):
            self.ended.append(Answer(None))
        self.flights.append(flight)


def oracle(data: bytes, end: bool) -> tuple[Answer, bool]:
    """Return what h11 makes of an answer, and whether the connection may be used again."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("Host", "h"), ("Content-Length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    if end:
        client.receive_data(b"")
    status, body, fields = 0, b"", {}
    while not isinstance(event := client.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Response):
            status, fields = event.status_code, {bytes(name): bytes(value) for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        else:
            assert isinstance(event, h11.InformationalResponse), event
    return Answer(status, body, fields), not end and client.their_state is client.our_state is h11.DONE


def chunked(body: bytes, sizes: Sequence[int], trailers: bytes = b"") -> bytes:
    made, at = b"", 0
    for size in sizes:
        if piece := body[at : at + size]:
            made += b"%x\r\n%s\r\n" % (len(piece), piece)
        at += size
    rest = body[at:]
    return made + (b"%x;name=value\r\n%s\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n" + trailers + b"\r\n"


LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, [3, 1, 20], b"Content-Encoding: gzip\r\nX-Sum: 1\r\n")
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 7\r\n\r\n"
ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\n" + LENGTH + b"X-Empty:\r\n\r\n" + BODY, False),
    "no reason": (b"HTTP/1.1 200 \r\n" + LENGTH + b"\r\n" + BODY, False),
    "other case": (b"HTTP/1.1 200 OK\r\ncOnTeNt-LeNgTh: %d\r\n\r\n" % len(BODY) + BODY, False),
    "chunked": (b"HTTP/1.1 200 OK\r\n" + CHUNKS, False),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\n" + EARLY + b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + BODY, False),
    "interim, chunked": (EARLY + b"HTTP/1.1 503 Busy\r\n" + CHUNKS, False),
    "last": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + LENGTH + b"\r\n" + BODY, False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n" + LENGTH + b"\r\n" + BODY, False),
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\n" + BODY, True),
    "HTTP/1.0 until the end": (b"HTTP/1.0 200 OK\r\n\r\n" + BODY, True),
    "nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", False),
    "empty": (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", False),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_at_every_split(name: str) -> None:
    data, end = ANSWERS[name]
    expected, reusable = oracle(data, end)
    assert expected.status
    for pieces in ([data], [data[place : place + 1] for place in range(len(data))]):
        assert heard(pieces, end) == (expected, reusable)
    for place in range(1, len(data)):
        assert heard([data[:place], data[place:]], end) == (expected, reusable)


def heard(pieces: Sequence[bytes], end: bool) -> tuple[Answer, bool]:
    line = Line()
    line.ask()
    line.hear(pieces, end)
    [answer], [_] = line.ended, line.flights
    return answer, line.reusable


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bool]:
    """The bytes of an answer, and whether it ends with the connection."""
    body = draw(st.binary(max_size=80))
    version = draw(st.sampled_from([b"1.1", b"1.1", b"1.0"]))
    framing = draw(st.sampled_from(["length", "end"] + ["chunked"] * (version == b"1.1")))
    names = st.sampled_from([b"X-A", b"Content-Encoding", b"Inference-Header-Content-Length", b"Date"])
    text = st.text("abc 0123;=,", max_size=8).map(lambda value: value.strip().encode())
    lines = [b"%s: %s" % pair for pair in draw(st.lists(st.tuples(names, text), max_size=4))]
    if version == b"1.1" and draw(st.booleans()):
        lines.append(b"Connection: close")
    content = body
    if framing == "length":
        lines.append(b"Content-Length: %d" % len(body))
    elif framing == "chunked":
        lines.append(b"Transfer-Encoding: chunked")
        trailers = draw(st.sampled_from([b"", b"Content-Encoding: b\r\n"]))
        content = chunked(body, draw(st.lists(st.integers(1, 30), max_size=4)), trailers)
    lines = draw(st.permutations(lines))
    early = draw(st.lists(st.sampled_from([100, 102, 103]), max_size=2))
    interim = b"".join(b"HTTP/1.1 %d Interim\r\nX: y\r\n\r\n" % status for status in early)
    status = draw(st.sampled_from([200, 201, 400, 404, 500, 503]))
    head = b"HTTP/%s %d Reason\r\n" % (version, status) + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    return interim * (version == b"1.1") + head + content, framing == "end"


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:stop] for start, stop in pairwise(edges)]


PLACES = st.lists(st.integers(0, 10**6), max_size=6)


@given(st.lists(st.tuples(answers(), PLACES), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_answers_on_one_connection_are_what_h11_reads(sent: list[tuple[tuple[bytes, bool], list[int]]]) -> None:
    line, expected = Line(), []
    for (data, end), places in sent:
        answer, reusable = oracle(data, end)
        expected.append(answer)
        line.ask()
        line.hear(cut(data, places), end)
        assert line.reusable == reusable
        if not reusable:
            break
    assert line.ended == expected
    assert len(line.flights) == len(expected)


@given(answers(), PLACES, st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=3)), max_size=4))
@settings(max_examples=400, deadline=None)
def test_whatever_comes_ends_one_flight(
    sent: tuple[bytes, bool], places: list[int], changes: list[tuple[int, bytes]]
) -> None:
    data = sent[0]
    for place, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + len(new) - 1 :]
    line = Line()
    line.ask()
    line.hear(cut(data, places), end=True)
    assert len(line.flights) == len(line.ended) == 1
    assert not line.reusable or not line.closed or cast(Any, line.connection.transport).is_closing()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"220 mail.example ESMTP\r\n", "not HTTP/1.1"),
        (b"\0\1\2", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + BODY[:-1], "closed before the answer"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "closed before the answer"),
        (b"HTTP/1.1 200 OK\r\n" + CHUNKS[:-3], "closed before the answer"),
        (b"", "closed before the answer"),
    ],
)
def test_what_is_no_answer(data: bytes, said: str) -> None:
    line = Line()
    line.ask()
    line.hear([data], end=True)
    [flight] = line.flights
    assert (flight.verdict, line.reusable) == (ERROR, False)
    assert said in flight.error
    assert flight.gone == ("closed" in said)


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\n" + LENGTH + b"\r\n" + BODY, b"HTTP/1.1", b"\0"])
def test_what_follows_an_answer_belongs_to_nobody(more: bytes) -> None:
    data = ANSWERS["length"][0]
    line = Line()
    line.ask()
    line.hear([data + more])
    assert [(answer.status, answer.body) for answer in line.ended] == [(200, BODY)]
    assert (line.closed, line.reusable) == (True, False)
    later = Line()
    later.ask()
    later.hear([data])
    assert later.reusable
    later.hear([more])
    assert len(later.ended) == 1
    assert later.closed


def test_a_large_answer_is_whole() -> None:
    body = b'{"id":"' + b"x" * 3_000_000 + b'",' + BODY[1:]
    [flight] = load(
        http_peer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body), "http", requests=1, timeout=20.0
    )
    assert flight.verdict == OK


@pytest.mark.parametrize("name", [name for name, (_, end) in ANSWERS.items() if not end])
def test_over_a_socket(name: str) -> None:
    found = load(http_peer(ANSWERS[name][0]), "http", timeout=10.0)
    status = oracle(*ANSWERS[name])[0].status
    assert [flight.verdict for flight in found] == [OK if status == 200 else ERROR] * 3, found[0].error


def test_an_answer_that_never_ends_is_timed_out() -> None:
    found = load(http_peer(b"HTTP/1.1 200 OK\r\nX: "), "http", timeout=0.1)
    assert [flight.verdict for flight in found] == [TIMEOUT] * 3


def test_a_connection_that_is_not_there_in_time_is_timed_out() -> None:
    """The peer takes the connection and never says a word of TLS."""

    async def main() -> list[Flight]:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            place = f"127.0.0.1:{silent.getsockname()[1]}"
            sender = HttpSender(place, lambda flight: b"", 0.1, tls=ssl.create_default_context())
            try:
                return await flights(Plan(f"https://{place}", 5.0, concurrency=1, requests=3, warmup=0.0), sender)
            finally:
                await sender.close()

    found = asyncio.run(asyncio.wait_for(main(), 30.0))
    assert [(flight.verdict, flight.sent) for flight in found] == [(TIMEOUT, None)] * 3, found[0].error
    assert found[0].error == "no connection in time"
