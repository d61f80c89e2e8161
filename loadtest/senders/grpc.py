"""gRPC: one `ModelInfer` call for each request, over an HTTP/2 of our own; and what calls and streams share."""

import asyncio
import gzip
import zlib
from collections import deque
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from loadtest import wire
from loadtest.answers import Answers
from loadtest.client import GRPC_ERRORS, is_no_connection
from loadtest.connection import PLAIN, Connection, address
from loadtest.results import TIMEOUT, Flight
from loadtest.senders import http2
from loadtest.senders.sender import Encode, Finished, check, fail

_CODES = tuple(GRPC_ERRORS)  # they stand in the order of their numbers
SERVICE = "/inference.GRPCInferenceService"
_GREETING = 5.0
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcSender:
    """`ModelInfer` calls with ready-made bytes on one connection.

    Args:
        url: `grpc://HOST:PORT` or `grpcs://HOST:PORT`.
        encode: makes the serialised request.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
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

        self.url, self.encode, self.timeout, self.answers, self.zero = url, encode, timeout, answers, 0.0
        self.connection = connection
        self.finished: Finished = lambda flight: None
        self._no_message, self._parse = DecodeError, service_pb2.ModelInferResponse.FromString
        self._block = http2.block(_headers(url, connection))
        self._http2: http2.Http2 | None = None
        self._queue: deque[Flight] = deque()
        self._connecting: asyncio.Task[None] | None = None

    async def open(self, connections: int) -> None:
        """Open the connection; it carries all calls, for more were seen to be slower."""
        self.loop = asyncio.get_running_loop()
        await self._connect()

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.zero = zero

    def send(self, flight: Flight) -> None:
        """Start a call, on a new connection if there is none."""
        if self._http2:
            self._start(self._http2, flight)
            return
        self._queue.append(flight)
        if self._connecting is None:
            self._connecting = self.loop.create_task(self._connect())

    async def close(self) -> None:
        """Drop the connection, and with it whatever is still in flight."""
        if self._connecting:
            self._connecting.cancel()
        if self._http2:
            self._http2.close()
        await asyncio.sleep(0)

    async def _connect(self) -> None:
        _, place, encrypted = address(self.url)
        host, _, port = place.rpartition(":")
        tls = self.connection.tls() if encrypted else None
        if tls:
            tls.set_alpn_protocols(["h2"])
        connection, failure = http2.Http2(self._lost), ""
        made = self.loop.create_connection(lambda: connection, host.strip("[]"), int(port), ssl=tls)
        try:
            await asyncio.wait_for(made, self.timeout)
            await asyncio.wait_for(connection.ready.wait(), self.timeout or _GREETING)
            failure = connection.error
        except TimeoutError:
            connection.close()
            failure = "connection: the server does not say hello"
        except OSError as error:
            failure = f"connection: {error.strerror or error}"
        self._connecting = None
        if not failure:
            self._http2 = connection
        waiting, self._queue = self._queue, deque()
        for flight in waiting:
            if failure:
                self._fail(flight, "UNAVAILABLE", failure)
            else:
                self.send(flight)

    def _lost(self, connection: http2.Http2) -> None:
        if self._http2 is connection:
            self._http2 = None

    def _start(self, connection: http2.Http2, flight: Flight) -> None:
        data, timer = self.encode(flight), None
        if self.connection.compression:
            data = b"\x01" + _packed(data, self.connection.compression)
        else:
            data = b"\0" + len(data).to_bytes(4) + data

        def done(call: http2.Call, error: str) -> None:
            flight.done = self.loop.time() - self.zero
            if timer:
                timer.cancel()
            self._answered(flight, call, error)
            self.finished(flight)

        def expire() -> None:
            connection.cancel(call)
            self._fail(flight, "DEADLINE_EXCEEDED", "")

        if self.timeout is not None:
            timer = self.loop.call_later(self.timeout, expire)
        flight.sent = self.loop.time() - self.zero
        call = connection.call(self._block, data, done)

    def _fail(self, flight: Flight, code: str, details: str) -> None:
        flight.done = self.loop.time() - self.zero
        explain(flight, code, details)
        self.finished(flight)

    def _answered(self, flight: Flight, call: http2.Call, error: str) -> None:
        if error:
            explain(flight, "UNAVAILABLE", error)
            return
        ending, first = http2.fields(call.blocks[-1]), http2.fields(call.blocks[0])
        status = ending.get("grpc-status", "")
        if not status.isdigit() or int(status) >= len(_CODES):
            fail(flight, f"no gRPC: HTTP {first.get(':status', 'without a status')}")
        elif status != "0":
            explain(flight, _CODES[int(status)], unquote(ending.get("grpc-message", "")))
        else:
            try:
                judge(self.answers, flight, self._parse(_message(call.body)))
            except (self._no_message, zlib.error):
                fail(flight, "the answer is not a ModelInferResponse")


def _headers(url: str, connection: Connection) -> list[tuple[str, str]]:
    _, place, encrypted = address(url)
    first = [(":method", "POST"), (":scheme", "https" if encrypted else "http"), (":path", f"{SERVICE}/ModelInfer")]
    first += [(":authority", place), ("te", "trailers"), ("content-type", "application/grpc")]
    if connection.compression:
        first.append(("grpc-encoding", connection.compression))
    return [*first, ("grpc-accept-encoding", "identity,gzip,deflate"), *(metadata(connection) or ())]


@lru_cache(maxsize=256)  # the payloads of a run are cycled through
def _packed(data: bytes, compression: str) -> bytes:
    packed = gzip.compress(data) if compression == "gzip" else zlib.compress(data)
    return len(packed).to_bytes(4) + packed


def _message(body: bytearray) -> bytes:
    """Return the one message of an answer."""
    data = bytes(memoryview(body)[5:])
    # 32 lets zlib find out which of the two formats it is.
    return zlib.decompress(data, 32 + zlib.MAX_WBITS) if body[:1] == b"\x01" else data


def channel(url: str, connection: Connection) -> Any:
    """Return an open channel; use it in an event loop."""
    import grpc
    import grpc.aio

    _, place, encrypted = address(url)
    packing = {None: grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
    options = {"options": _OPTIONS, "compression": packing[connection.compression]}
    if encrypted:
        return grpc.aio.secure_channel(place, connection.credentials(), **options)
    return grpc.aio.insecure_channel(place, **options)


def metadata(connection: Connection) -> tuple[tuple[str, str], ...] | None:
    """Return the headers as gRPC takes them: names in small letters."""
    return tuple((name.lower(), value) for name, value in connection.headers) or None


def explain(flight: Flight, code: str, details: str) -> None:
    """Give the flight the verdict of a call that failed with this status."""
    if code == "DEADLINE_EXCEEDED":
        fail(flight, "no answer in time", verdict=TIMEOUT)
    else:
        fail(flight, f"{code}: {details}", gone=code == "UNAVAILABLE" and is_no_connection(details))


def judge(answers: Answers | None, flight: Flight, response: Any) -> None:
    """Give the flight its verdict by a `ModelInferResponse`."""
    if not response.outputs:
        fail(flight, "an answer without outputs")
    elif answers:
        raw = b"".join(response.raw_output_contents)
        check(answers, flight, raw, lambda: wire.grpc_outputs(response))
