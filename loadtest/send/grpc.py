"""gRPC: one `ModelInfer` call for each request, over an HTTP/2 of our own; and what calls and streams share."""

import asyncio
import gzip
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote

from loadtest.plan.data.answers import Answers
from loadtest.record.results import TIMEOUT, Flight
from loadtest.send import http2, wire
from loadtest.send.sender import Carrier, Encode, check, end, fail
from modelathe.connection import PLAIN, Connection, address
from modelathe.outputs import stream_outputs
from modelathe.translation import GRPC_ERRORS, is_no_connection

_CODES = {str(number): name for number, name in enumerate(GRPC_ERRORS)}  # they stand in the order of their numbers
SERVICE = "/inference.GRPCInferenceService"
_GREETING = 5.0
_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", round(1000 * _GREETING)),  # gRPC's name for how long connecting may take
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class _Call(http2.Call):
    """The call of a flight."""

    __slots__ = ("flight", "timer")

    def __init__(self, flight: Flight, block: bytes, body: bytes, done: Callable[[Any, str], None]) -> None:
        super().__init__(block, body, done)
        self.flight = flight
        self.timer: asyncio.TimerHandle | None = None


class GrpcSender(Carrier):
    """`ModelInfer` calls with ready-made bytes on one connection.

    Args:
        url: `grpc://HOST:PORT` or `grpcs://HOST:PORT`.
        encode, timeout, answers: as in `Carrier`; what is encoded is the serialised message.
        connection: its certificates, headers and compression.
    """

    def __init__(
        self,
        url: str,
        encode: Encode,
        timeout: float | None,
        answers: Answers | None = None,
        connection: Connection = PLAIN,
    ) -> None:
        from google.protobuf.message import DecodeError
        from tritonclient.grpc import service_pb2

        super().__init__(encode, timeout, answers, connection.shared_memory is not None)
        self.url, self.connection = url, connection
        self._no_message, self._parse = DecodeError, service_pb2.ModelInferResponse.FromString
        self._block = http2.block(_headers(url, connection))
        self._http2: http2.Http2 | None = None
        self._all: set[http2.Http2] = set()
        self._queue: dict[_Call, None] = {}  # in order; those whose time is over leave from the middle
        self._connecting: asyncio.Task[None] | None = None

    async def open(self, connections: int) -> None:
        """Open the connection; it carries all calls, for more were seen to be slower."""
        self.loop = asyncio.get_running_loop()
        await self._connect()

    def send(self, flight: Flight) -> None:
        """Start a call, on a new connection if there is none."""
        call = _Call(flight, self._block, self._framed(self.encode(flight)), self._answered)
        if self.timeout is not None:
            call.timer = self.loop.call_later(self.timeout, self._expire, call)
        self._start(call)

    async def close(self) -> None:
        """Drop all connections, and with them whatever is still in flight."""
        if self._connecting:
            self._connecting.cancel()
        for connection in tuple(self._all):
            connection.close()
        await asyncio.sleep(0)

    async def _connect(self) -> None:
        _, place, encrypted = address(self.url)
        host, _, port = place.rpartition(":")
        tls = self.connection.tls() if encrypted else None
        if tls:
            tls.set_alpn_protocols(["h2"])
        connection, failure = http2.Http2(self._retired, self._all.discard), ""
        self._all.add(connection)
        made = self.loop.create_connection(lambda: connection, host.strip("[]"), int(port), ssl=tls)
        try:
            await asyncio.wait_for(made, self.timeout)
            await asyncio.wait_for(connection.ready.wait(), self.timeout or _GREETING)
            failure = connection.error or ("" if connection.usable else "connection: GOAWAY")
        except TimeoutError:
            failure = "connection: the server does not say hello"
        except OSError as error:
            failure = f"connection: {error.strerror or error}"
        self._connecting = None
        if failure:
            connection.close()
            self._all.discard(connection)
        else:
            self._http2 = connection
        waiting, self._queue = self._queue, {}
        for call in waiting:
            if failure:
                self._answered(call, failure)
            else:
                self._start(call)

    def _retired(self, connection: http2.Http2, unanswered: list[http2.Call]) -> None:
        """Start on another connection what this one has done nothing for."""
        if self._http2 is connection:
            self._http2 = None
        for call in unanswered:
            self._start(cast(_Call, call))

    def _start(self, call: _Call) -> None:
        if self._http2 is None:
            self._queue[call] = None
            if self._connecting is None:
                self._connecting = self.loop.create_task(self._connect())
            return
        if call.flight.sent is None:
            # What waits because the server takes no more calls at once waits for the server, not for us.
            call.flight.sent = self.loop.time() - self.zero
        self._http2.start(call)

    def _framed(self, data: bytes) -> bytes:
        """Return a message with its prefix: whether it is compressed, and its length."""
        if self.connection.compression:
            return b"\x01" + _packed(data, self.connection.compression)
        return b"\0" + len(data).to_bytes(4) + data

    def _expire(self, call: _Call) -> None:
        if call.connection:
            call.connection.cancel(call)
        self._queue.pop(call, None)
        end(self, call.flight, lambda: explain(call.flight, "DEADLINE_EXCEEDED", ""))

    def _answered(self, call: _Call, error: str) -> None:
        if call.timer:
            call.timer.cancel()
        end(self, call.flight, lambda: self._judge(call.flight, call, error))

    def _judge(self, flight: Flight, call: _Call, error: str) -> None:
        if error:
            explain(flight, "UNAVAILABLE", error)
            return
        if not call.blocks:
            fail(flight, "no gRPC: an answer without headers")
            return
        ending, first = http2.fields(call.blocks[-1]), http2.fields(call.blocks[0])
        code = _CODES.get(ending.get("grpc-status", ""))
        if code is None:
            fail(flight, f"no gRPC: HTTP {first.get(':status', 'without a status')}")
        elif code != "OK":
            explain(flight, code, unquote(ending.get("grpc-message", "")))
        else:
            data = _message(call.body)
            try:
                response = self._parse(data)
            except self._no_message:
                fail(flight, "the answer is not a ModelInferResponse")
            else:
                judge(self.answers, flight, [response], data, self.elsewhere)


def _headers(url: str, connection: Connection) -> list[tuple[str, str]]:
    _, place, encrypted = address(url)
    first = [(":method", "POST"), (":scheme", "https" if encrypted else "http"), (":path", f"{SERVICE}/ModelInfer")]
    first += [(":authority", connection.host or place), ("te", "trailers"), ("content-type", "application/grpc")]
    if connection.compression:
        first.append(("grpc-encoding", connection.compression))
    return [*first, ("grpc-accept-encoding", "identity,gzip,deflate"), *(metadata(connection) or ())]


@lru_cache(maxsize=256)  # the payloads of a run are cycled through
def _packed(data: bytes, compression: str) -> bytes:
    packed = gzip.compress(data) if compression == "gzip" else zlib.compress(data)
    return len(packed).to_bytes(4) + packed


def _message(body: bytearray) -> bytes:
    """Return the one message of an answer.

    Raises:
        ValueError, zlib.error: it is none, or not a whole one.
    """
    data = bytes(memoryview(body)[5:])
    if len(body) < 5 or int.from_bytes(body[1:5]) != len(data):
        raise ValueError(f"{len(body)} bytes are not one whole gRPC message")
    # 32 lets zlib find out which of the two formats it is.
    return zlib.decompress(data, 32 + zlib.MAX_WBITS) if body[:1] == b"\x01" else data


def channel(url: str, connection: Connection) -> Any:
    """Return an open channel; use it in an event loop."""
    import grpc
    import grpc.aio

    _, place, encrypted = address(url)
    packing = {None: grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
    options = {"options": [*connection.channel(), *_OPTIONS], "compression": packing[connection.compression]}
    if encrypted:
        return grpc.aio.secure_channel(place, connection.credentials(), **options)
    return grpc.aio.insecure_channel(place, **options)


def metadata(connection: Connection) -> tuple[tuple[str, str], ...] | None:
    """Return the headers as gRPC takes them: names in small letters."""
    return tuple((name.lower(), value) for name, value in connection.others) or None


def explain(flight: Flight, code: str, details: str) -> None:
    """Give the flight the verdict of a call that failed with this status."""
    if code == "DEADLINE_EXCEEDED":
        fail(flight, "no answer in time", verdict=TIMEOUT)
    else:
        fail(flight, f"{code}: {details}", gone=code == "UNAVAILABLE" and is_no_connection(details))


def judge(answers: Answers | None, flight: Flight, responses: Sequence[Any], raw: bytes, elsewhere: bool) -> None:
    """Give the flight its verdict by its `ModelInferResponse`, or several.

    Args:
        answers: what to compare the outputs with.
        flight: that they answer.
        responses: to the request, in order.
        raw: of equal bytes are equal answers.
        elsewhere: the values were asked for in shared memory.
    """
    missing = wire.grpc_missing(responses, elsewhere)
    check(answers, flight, raw, missing, lambda: stream_outputs(responses))
