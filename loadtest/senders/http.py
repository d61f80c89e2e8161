"""HTTP: the V2 protocol with binary tensors over HTTP/1.1."""

import asyncio
from functools import lru_cache
from typing import cast

from loadtest import wire
from loadtest.answers import Answers
from loadtest.results import ERROR, TIMEOUT, Flight
from loadtest.senders.sender import Encode, Finished, check, fail


class HttpSender:
    """KServe V2 over HTTP/1.1 with kept-alive connections, one request at a time on each.

    Args:
        address: HOST:PORT.
        encode: makes the complete request.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
    """

    def __init__(self, address: str, encode: Encode, timeout: float | None, answers: Answers | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.host, self.port = host.strip("[]"), int(port)
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
        _, connection = await self.loop.create_connection(lambda: _Connection(self), self.host, self.port)
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


class _Connection(asyncio.Protocol):
    """One kept-alive connection: writes a request, gathers its answer, goes back to the idle ones."""

    def __init__(self, sender: HttpSender) -> None:
        self.sender = sender
        self.flight: Flight | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.buffer = bytearray()
        self.head = self.need = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.sender.all.add(self)

    def send(self, flight: Flight) -> None:
        loop = self.sender.loop
        self.flight, self.need = flight, 0
        self.buffer.clear()
        data = self.sender.encode(flight)
        if self.sender.timeout is not None:
            self.timer = loop.call_later(self.sender.timeout, self._expire)
        flight.sent = loop.time() - self.sender.zero
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.flight is None:
            self.transport.abort()  # an answer that nobody asked for; the connection cannot be trusted any more
            return
        if not self.need and not self._read_head():
            return
        if len(self.buffer) >= self.need:
            self._answered(self.flight)

    def _read_head(self) -> bool:
        """Learn from the header how long the answer is; False while it is incomplete or when it makes no sense."""
        if not b"HTTP/1.1 ".startswith(bytes(self.buffer[:9])):
            self._end("the answer is not HTTP/1.1", ERROR)
            return False
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = _parse_head(bytes(self.buffer[:end]))
        if head is None:
            self._end("the answer has no Content-Length", ERROR)
            return False
        self.keep, json_length, length = head
        self.head = end + 4
        self.json_end, self.need = self.head + json_length, self.head + length
        return True

    def _answered(self, flight: Flight) -> None:
        sender = self.sender
        flight.done = sender.loop.time() - sender.zero
        if self.timer:
            self.timer.cancel()
        if self.buffer[9:12] != b"200":
            text = bytes(self.buffer[self.head : self.need]).decode("utf-8", "replace")
            fail(flight, f"HTTP {bytes(self.buffer[9:12]).decode('latin-1')}: {text}")
        elif b'"outputs"' not in self.buffer[self.head : self.json_end]:
            fail(flight, "HTTP 200 without outputs")
        else:
            head, raw = bytes(self.buffer[self.head : self.json_end]), bytes(self.buffer[self.json_end : self.need])
            check(sender.answers, flight, raw, lambda: wire.http_outputs(head, raw))
        self.flight = None
        if self.keep and len(self.buffer) == self.need:
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


@lru_cache(maxsize=256)  # a server's answers have few different headers; parsing them cost a third of our own time
def _parse_head(head: bytes) -> tuple[bool, int, int] | None:
    """Return whether the connection stays open, and the lengths of the JSON header and of the whole body."""
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    fields = {name.strip().lower(): value.strip() for name, _, value in lines}
    length = fields.get(b"content-length", b"")
    json_length = fields.get(b"inference-header-content-length", length)
    if not length.isdigit() or not json_length.isdigit():
        return None
    return fields.get(b"connection", b"").lower() != b"close", int(json_length), int(length)
