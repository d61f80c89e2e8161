"""HTTP: the V2 protocol with binary tensors over HTTP/1.1."""

import asyncio
import ssl
import zlib
from functools import lru_cache
from typing import NamedTuple, cast

from loadtest import wire
from loadtest.answers import Answers
from loadtest.results import ERROR, TIMEOUT, Flight
from loadtest.senders.sender import Encode, Finished, check, fail

_BUFFER = 16 * 1024
_NO_OUTPUTS = "HTTP 200 without outputs"


class HttpSender:
    """KServe V2 over HTTP/1.1 with kept-alive connections, one request at a time on each.

    Args:
        address: HOST:PORT.
        encode: makes the complete request.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
        tls: what to encrypt with; None does not.
    """

    def __init__(
        self,
        address: str,
        encode: Encode,
        timeout: float | None,
        answers: Answers | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        host, _, port = address.rpartition(":")
        self.host, self.port, self.tls = host.strip("[]"), int(port), tls
        self.encode, self.timeout, self.answers, self.zero = encode, timeout, answers, 0.0
        self.finished: Finished = lambda flight: None
        self.idle: list[_Connection] = []
        self.all: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self, connections: int) -> None:
        """Open this many connections."""
        self.loop = asyncio.get_running_loop()
        try:
            self.idle.extend(await asyncio.gather(*(self._connect() for _ in range(connections))))
        except OSError:
            # The requests themselves will meet the same and be counted.
            return

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.zero = zero

    def send(self, flight: Flight) -> None:
        """Send on an idle connection, or on a new one when all are busy."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                connection.send(flight)
                return
        task = self.loop.create_task(self._send_on_new(flight))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def close(self) -> None:
        """Drop all connections, and with them whatever is still in flight."""
        for task in tuple(self._connecting):
            task.cancel()
        for connection in tuple(self.all):
            connection.flight = None
            connection.transport.abort()
        await asyncio.sleep(0)

    async def _connect(self) -> "_Connection":
        _, connection = await self.loop.create_connection(lambda: _Connection(self), self.host, self.port, ssl=self.tls)
        return connection

    async def _send_on_new(self, flight: Flight) -> None:
        try:
            connection = await asyncio.wait_for(self._connect(), self.timeout)
        except OSError as error:
            flight.done = self.loop.time() - self.zero
            fail(flight, f"no connection: {error.strerror or error}", gone=True)
            self.finished(flight)
        else:
            connection.send(flight)


class _Connection(asyncio.BufferedProtocol):
    """One kept-alive connection: writes a request, gathers its answer, goes back to the idle ones.

    The answer is gathered in a buffer of its own: asyncio would allocate 256 KiB for every read.
    """

    def __init__(self, sender: HttpSender) -> None:
        self.sender = sender
        self.flight: Flight | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.buffer = bytearray(_BUFFER)
        self.filled = self.start = self.need = 0
        self.head: _Head | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.sender.all.add(self)

    def send(self, flight: Flight) -> None:
        sender = self.sender
        self.flight, self.head, self.filled = flight, None, 0
        data = sender.encode(flight)
        if sender.timeout is not None:
            self.timer = sender.loop.call_later(sender.timeout, self._expire)
        flight.sent = sender.loop.time() - sender.zero
        self.transport.write(data)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.filled == len(self.buffer):
            # A view of the old one may still be out, so it cannot be resized.
            grown = bytearray(max(2 * self.filled, self.need if self.head else 0))
            grown[: self.filled] = self.buffer
            self.buffer = grown
        return memoryview(self.buffer)[self.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self.filled += nbytes
        if self.flight is None:
            self.transport.abort()  # an answer that nobody asked for; the connection cannot be trusted any more
        elif (self.head or self._read_head()) and self.filled >= self.need:
            self._answered(self.flight)

    def _read_head(self) -> bool:
        """Learn from the header how long the answer is; False while it is incomplete or when it makes no sense."""
        end = self.buffer.find(b"\r\n\r\n", 0, self.filled)
        self.head = _parse_head(bytes(self.buffer[: max(end, 0)]))
        if self.head:
            self.start, self.need = end + 4, end + 4 + self.head.length
            return True
        if not b"HTTP/1.1 ".startswith(bytes(self.buffer[: min(9, self.filled)])):
            self._end("the answer is not HTTP/1.1", ERROR)
        elif end >= 0:
            self._end("the answer has no Content-Length", ERROR)
        return False

    def _answered(self, flight: Flight) -> None:
        sender, head = self.sender, cast(_Head, self.head)
        flight.done = sender.loop.time() - sender.zero
        if self.timer:
            self.timer.cancel()
        if head.status == b"200" and not head.packed and not sender.answers:
            if self.buffer.find(b'"outputs"', self.start, self.start + head.json) < 0:
                fail(flight, _NO_OUTPUTS)
        else:
            _judge(sender.answers, flight, head, bytes(memoryview(self.buffer)[self.start : self.need]))
        self.flight = None
        if head.keep and self.filled == self.need:
            sender.idle.append(self)
        else:
            self.transport.abort()
        sender.finished(flight)

    def _expire(self) -> None:
        self._end("no answer in time", TIMEOUT)

    def _end(self, text: str, verdict: str, gone: bool = False) -> None:
        flight, self.flight = self.flight, None
        self.transport.abort()
        if flight is not None:
            if self.timer:
                self.timer.cancel()
            flight.done = self.sender.loop.time() - self.sender.zero
            fail(flight, text, gone=gone, verdict=verdict)
            self.sender.finished(flight)

    def connection_lost(self, exc: Exception | None) -> None:
        self.sender.all.discard(self)
        self._end("the connection was closed before the answer", ERROR, gone=True)


def _judge(answers: Answers | None, flight: Flight, head: "_Head", body: bytes) -> None:
    """Give the flight its verdict by the answer's status and body."""
    try:
        # 32 lets zlib find out which of the two formats it is.
        body = zlib.decompress(body, 32 + zlib.MAX_WBITS) if head.packed else body
    except zlib.error as error:
        fail(flight, f"the answer cannot be decompressed: {error}")
        return
    split = head.json if head.split else len(body)
    if head.status != b"200":
        fail(flight, f"HTTP {head.status.decode('latin-1')}: {body.decode('utf-8', 'replace')}")
    elif b'"outputs"' not in body[:split]:
        fail(flight, _NO_OUTPUTS)
    elif answers:
        raw = body[split:]
        check(answers, flight, raw, lambda: wire.http_outputs(body[:split], raw))


class _Head(NamedTuple):
    """What an answer's header says: status, the lengths of the body and of the JSON in it, and how it is sent."""

    status: bytes
    keep: bool
    length: int
    json: int
    split: bool
    packed: bool


@lru_cache(maxsize=256)  # a server's answers have few different headers; parsing them cost a third of our own time
def _parse_head(head: bytes) -> _Head | None:
    """Return what the lines say, None where they are not those of an answer with a length."""
    first, *rest = head.split(b"\r\n")
    lines = (line.partition(b":") for line in rest)
    fields = {name.strip().lower(): value.strip() for name, _, value in lines}
    length = fields.get(b"content-length", b"")
    json_length = fields.get(b"inference-header-content-length", length)
    if not first.startswith(b"HTTP/1.1 ") or not length.isdigit() or not json_length.isdigit():
        return None
    keep = fields.get(b"connection", b"").lower() != b"close"
    split, packed = b"inference-header-content-length" in fields, b"content-encoding" in fields
    return _Head(first[9:12], keep, int(length), int(json_length), split, packed)
