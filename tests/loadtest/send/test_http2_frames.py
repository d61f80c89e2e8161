"""HTTP/2 frame by frame, beside another implementation (h2): what is sent keeps the rules, what comes is understood."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.plan.plan import Plan
from loadtest.record.results import OK
from loadtest.send import http2
from loadtest.send.grpc import GrpcSender
from loadtest.send.http2 import Call, Http2, _frame
from tests.loadtest.peers import flights, message

REQUEST = [(":method", "POST"), (":scheme", "http"), (":path", "/m"), (":authority", "h")]


class Line:
    """A connection without a network; what it writes is kept, and calls that end or are handed over are counted."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.ended: dict[Call, str] = {}
        self.handed_over: list[Call] = []
        self.count: Counter[Call] = Counter()
        self.closed = False
        self.http2 = Http2(self._lost)
        self.http2.connection_made(self)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def _lost(self, connection: Http2, calls: list[Call]) -> None:
        self.handed_over += calls
        self.count.update(calls)

    def start(self, body: bytes = b"body") -> Call:
        call = Call(http2.block(REQUEST), body, self._done)
        self.http2.start(call)
        return call

    def _done(self, call: Call, error: str) -> None:
        self.ended[call] = error
        self.count[call] += 1

    def hear(self, data: bytes, places: Sequence[int] = ()) -> None:
        edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
        for start, stop in pairwise(edges):
            at = start
            while at < stop and not self.closed:
                room = self.http2.get_buffer(-1)
                piece = data[at : min(stop, at + len(room))]
                room[: len(piece)] = piece
                self.http2.buffer_updated(len(piece))
                at += len(piece)

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Take what was written, as kind, flags, number and payload; the greeting is left away."""
        data, found, at = bytes(self.written).removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), [], 0
        self.written.clear()
        while at < len(data):
            size = int.from_bytes(data[at : at + 3])
            number = int.from_bytes(data[at + 5 : at + 9])
            found.append((data[at + 3], data[at + 4], number, data[at + 9 : at + 9 + size]))
            at += 9 + size
        return found


def greeting(**wanted: int) -> bytes:
    codes = {"streams": 3, "window": 4, "frame": 5}
    return _frame(
        http2.SETTINGS, 0, 0, b"".join(codes[name].to_bytes(2) + value.to_bytes(4) for name, value in wanted.items())
    )


def sent_data(line: Line) -> list[tuple[int, int]]:
    return [(number, len(payload)) for kind, _, number, payload in line.frames() if kind == http2.DATA]


@pytest.mark.parametrize("wide", [False, True])
def test_a_window_below_zero_lets_nothing_out(wide: bool) -> None:
    line = Line()
    line.hear(greeting())
    if wide:
        line.hear(_frame(http2.WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4)))
    call = line.start(bytes(400_000))
    assert sum(size for _, size in sent_data(line)) == 65_535
    line.hear(greeting(window=1000))
    assert (call.window, sent_data(line)) == (1000 - 65_535, [])
    if not wide:
        line.hear(_frame(http2.WINDOW_UPDATE, 0, 0, (2**20).to_bytes(4)))
    line.hear(_frame(http2.WINDOW_UPDATE, 0, call.id, (64_535).to_bytes(4)))
    assert (call.window, sent_data(line)) == (0, [])
    line.hear(_frame(http2.WINDOW_UPDATE, 0, call.id, (20_000).to_bytes(4)))
    assert sent_data(line) == [(1, 16_384), (1, 3616)]


def test_calls_that_wait_never_start_on_a_connection_that_says_farewell() -> None:
    line = Line()
    line.hear(greeting(streams=1))
    first, second, third = (line.start() for _ in range(3))
    line.frames()
    line.hear(_frame(http2.GOAWAY, 0, 0, (1).to_bytes(4) + bytes(4)))
    assert line.handed_over == [second, third]
    line.hear(_frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, http2.block([("grpc-status", "0")])))
    assert line.ended == {first: ""}
    assert [kind for kind, *_ in line.frames() if kind == http2.HEADERS] == []
    assert line.closed  # nothing is left to come
    late = line.start()
    assert line.handed_over[-1] is late


def test_calls_beyond_the_last_that_is_answered_go_elsewhere() -> None:
    line = Line()
    line.hear(greeting())
    first, second, third = (line.start(bytes(50_000)) for _ in range(3))
    line.hear(_frame(http2.GOAWAY, 0, 0, (2**31 - 1).to_bytes(4) + bytes(4)))
    assert (line.handed_over, line.ended) == ([], {})
    line.hear(_frame(http2.GOAWAY, 0, 0, (1).to_bytes(4) + bytes(4)))
    assert line.handed_over == [second, third]
    assert not line.closed
    line.hear(_frame(http2.RST_STREAM, 0, 1, (2).to_bytes(4)))
    assert "error 2" in line.ended[first]


def test_a_call_does_not_go_from_connection_to_connection_for_ever() -> None:
    call, error = None, ""
    for _ in range(10):
        line = Line()
        line.hear(greeting(streams=0))
        if call is None:
            call = line.start()
        else:
            call.done = line._done
            line.http2.start(call)
        line.hear(_frame(http2.GOAWAY, 0, 0, bytes(8)))
        error = line.ended.get(call, "")
        if error:
            break
    assert "GOAWAY" in error


@pytest.mark.parametrize("streams", [1, 2])
def test_a_farewell_costs_no_request(streams: int) -> None:
    """Each connection answers one call and leaves; the calls that waited get their answers on the next."""
    connections, answer = [0], message(ANSWER)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[0] += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.write(greeting(streams=streams))
            await reader.readexactly(24)
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3]))
                number = int.from_bytes(head[5:9])
                if head[3] == http2.DATA and head[4] & http2.END_STREAM:
                    assert number == 1, "a call was started after the farewell"
                    writer.write(_frame(http2.GOAWAY, 0, 0, number.to_bytes(4) + bytes(4)) + answer(number))
                    break
            await reader.read()
        writer.close()

    async def main() -> list[str]:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        url = f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        sender = GrpcSender(url, lambda flight: b"", 10.0)
        try:
            found = await flights(Plan(url, 10.0, concurrency=3, requests=6, warmup=0.0, timeout=10.0), sender)
        finally:
            await sender.close()
            server.close()
            await asyncio.sleep(0.05)
        return [flight.error for flight in found if flight.verdict != OK]

    errors = asyncio.run(asyncio.wait_for(main(), 30))
    assert errors == []
    assert connections[0] >= 6


ANSWER = b"*\x0c\n\x01y\x12\x04FP32\x1a\x01\x01" + b"2\x04" + bytes(4)
"""A ModelInferResponse with one output."""


class Peer:
    """A server of the other implementation, which refuses what HTTP/2 does not allow."""

    def __init__(self, wanted: dict[SettingCodes, int]) -> None:
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = Settings(client=False, initial_values=wanted)
        self.h2.max_inbound_frame_size = self.h2.local_settings.max_frame_size
        self.h2.initiate_connection()
        self.bodies: dict[int, bytearray] = {}
        self.finished: set[int] = set()
        self.unacknowledged: Counter[int] = Counter()

    def take(self, data: bytes) -> None:
        """Read what the client sent; raises where it breaks a rule."""
        for event in self.h2.receive_data(data):
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            assert event.stream_id is not None
            self.bodies[event.stream_id] = bytearray()
        elif isinstance(event, DataReceived):
            assert event.stream_id is not None and event.data is not None
            self.bodies[event.stream_id] += event.data
            self.unacknowledged[event.stream_id] += event.flow_controlled_length or 0
        elif isinstance(event, StreamEnded):
            assert event.stream_id is not None
            self.finished.add(event.stream_id)
        assert not isinstance(event, StreamReset)

    def acknowledge(self) -> None:
        """Open the windows again by what was read."""
        for number, size in self.unacknowledged.items():
            self.h2.acknowledge_received_data(size, number)
        self.unacknowledged.clear()

    def answer(self, number: int, body: bytes, padding: int) -> None:
        self.h2.send_headers(number, [(":status", "200"), ("content-type", "application/grpc")])
        self.h2.send_data(number, body, pad_length=padding or None)
        self.h2.send_headers(number, [("grpc-status", "0"), ("grpc-message", "ü" * padding)], end_stream=True)


SETTINGS = st.fixed_dictionaries(
    {
        SettingCodes.INITIAL_WINDOW_SIZE: st.integers(1, 100_000),
        SettingCodes.MAX_FRAME_SIZE: st.integers(2**14, 40_000),
        SettingCodes.MAX_CONCURRENT_STREAMS: st.integers(1, 4),
    }
)


@given(
    SETTINGS,
    st.lists(st.integers(0, 120_000), min_size=1, max_size=6),
    st.lists(st.integers(0, 100_000), max_size=4),
    st.binary(max_size=300),
    st.integers(0, 20),
    st.lists(st.integers(0, 10**6), max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_another_implementation_agrees(
    wanted: dict[SettingCodes, int],
    sizes: list[int],
    windows: list[int],
    answer: bytes,
    padding: int,
    places: list[int],
) -> None:
    line, peer = Line(), Peer(wanted)
    peer.take(bytes(line.written))
    line.written.clear()
    line.hear(peer.h2.data_to_send(), places)
    calls = [line.start(bytes([n]) * size) for n, size in enumerate(sizes)]
    answered: set[int] = set()
    for turn in range(500):
        peer.take(bytes(line.written))
        line.written.clear()
        if turn < len(windows):
            # Smaller than what is under way already, as often as not.
            peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: windows[turn]})
            peer.h2.ping(bytes(8))
        else:
            peer.acknowledge()
            if turn == len(windows):
                peer.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 50_000})
        for number in peer.finished - answered:
            peer.answer(number, answer, padding)
            answered.add(number)
        line.hear(peer.h2.data_to_send(), places)
        if len(line.ended) == len(calls):
            break
    assert set(line.ended.values()) == {""}
    assert line.count == Counter(calls)
    for n, (call, size) in enumerate(zip(calls, sizes, strict=True)):
        assert peer.bodies[call.id] == bytes([n]) * size
        assert bytes(call.body) == answer
        assert http2.fields(call.blocks[0])[":status"] == "200"
        assert http2.fields(call.blocks[-1]) == {"grpc-status": "0", "grpc-message": "ü" * padding}


def a_conversation() -> bytes:
    """What a server sends in answer to two calls, with pieces of headers, padding, a ping and a farewell."""
    peer, line = Peer({}), Line()
    peer.take(bytes(line.written))
    line.written.clear()
    for _ in range(2):
        line.start()
    peer.take(bytes(line.written))
    peer.answer(3, b"second", 3)
    peer.h2.ping(b"12345678")
    peer.answer(1, b"first", 0)
    head = http2.block([("a", "b" * 20)])
    pieces = _frame(http2.HEADERS, 0, 5, head[:7]) + _frame(http2.CONTINUATION, http2.END_HEADERS, 5, head[7:])
    return peer.h2.data_to_send() + pieces + _frame(http2.GOAWAY, 0, 0, (3).to_bytes(4) + bytes(4))


CONVERSATION = a_conversation()


def understood(places: Sequence[int]) -> list[tuple[str, bytes, list[dict[str, str]]]]:
    line = Line()
    calls = [line.start() for _ in range(3)]
    line.hear(CONVERSATION, places)
    assert line.handed_over == [calls[2]]
    return [(line.ended[call], bytes(call.body), [http2.fields(one) for one in call.blocks]) for call in calls[:2]]


def test_a_conversation_at_every_split() -> None:
    whole = understood(())
    assert [(error, body) for error, body, _ in whole] == [("", b"first"), ("", b"second")]
    assert understood(range(len(CONVERSATION))) == whole
    for place in range(len(CONVERSATION)):
        assert understood([place]) == whole


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    st.lists(st.integers(0, 10**6), max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_whatever_comes_ends_every_call_once(changes: list[tuple[int, bytes]], places: list[int]) -> None:
    data = CONVERSATION
    for place, new in changes:
        at = place % len(data)
        data = data[:at] + new + data[at + len(new) :]
    line = Line()
    calls = [line.start(bytes(40_000)) for _ in range(4)]
    line.hear(data, places)
    line.http2.connection_lost(None)
    assert line.count == Counter(calls)


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (_frame(http2.DATA, 0, 1, b"x"), "not HTTP/2"),
        (_frame(http2.SETTINGS, http2.ACK, 0, b""), "not HTTP/2"),
        (greeting() + _frame(http2.SETTINGS, 0, 0, b"12345"), "settings of 5 bytes"),
        (greeting(frame=100), "frames of 100 bytes"),
        (greeting(window=2**31), "beyond its largest size"),
        (greeting() + _frame(http2.WINDOW_UPDATE, 0, 0, (2**31 - 1).to_bytes(4)), "beyond its largest size"),
        (greeting() + _frame(http2.WINDOW_UPDATE, 0, 1, b"abc"), "kind 8 with 3 bytes"),
        (greeting() + _frame(http2.PING, 0, 0, b"short"), "kind 6 with 5 bytes"),
        (greeting() + _frame(http2.DATA, http2.PADDED, 1, b"\x05abc"), "more padding"),
        (greeting() + _frame(http2.HEADERS, 0, 1, b"a") + _frame(http2.PING, 0, 0, bytes(8)), "broke off"),
        (greeting() + _frame(http2.CONTINUATION, 0, 1, b"a"), "had not begun"),
        (greeting() + _frame(http2.PUSH_PROMISE, 0, 1, bytes(8)), "a promise"),
        (greeting() + (2**21 << 40).to_bytes(8)[:5] + bytes(4), "a frame of 2097152 bytes"),
    ],
)
def test_what_http2_does_not_allow_ends_the_connection(frames: bytes, said: str) -> None:
    line = Line()
    call = line.start()
    line.hear(frames)
    assert line.closed
    assert said in line.ended[call]
    assert line.ended[call].startswith("connection: ")


def test_a_call_that_is_answered_before_all_of_it_was_sent_leaves_no_place_taken() -> None:
    line = Line()
    line.hear(greeting())
    line.start(bytes(100_000))
    line.frames()
    line.hear(_frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, http2.block([("grpc-status", "8")])))
    assert [(kind, number) for kind, _, number, _ in line.frames()] == [(http2.RST_STREAM, 1)]
    assert list(line.ended.values()) == [""]
