"""HTTP: the V2 protocol with binary tensors over HTTP/1.1."""

import asyncio
import ssl
import zlib
from typing import cast

import httptools

from loadtest.plan.data.answers import Answers
from loadtest.record.results import ERROR, TIMEOUT, Flight
from loadtest.send import wire
from loadtest.send.sender import Carrier, Encode, check, end, fail

_BUFFER = 256 * 1024


class HttpSender(Carrier):
    """KServe V2 over HTTP/1.1 with kept-alive connections, one request at a time on each.

    Args:
        address: HOST:PORT.
        encode, timeout, answers, elsewhere: as in `Carrier`; what is encoded is the complete request.
        tls: what to encrypt with; None does not.
    """

    def __init__(
        self,
        address: str,
        encode: Encode,
        timeout: float | None,
        answers: Answers | None = None,
        tls: ssl.SSLContext | None = None,
        elsewhere: bool = False,
    ) -> None:
        host, _, port = address.rpartition(":")
        super().__init__(encode, timeout, answers, elsewhere)
        self.host, self.port, self.tls = host.strip("[]"), int(port), tls
        self.idle: list[_Connection] = []
        self.all: set[_Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        # One for all connections, since the event loop fills it and has it read at once; for each read of a protocol
        # without one it would allocate as much.
        self.buffer = memoryview(bytearray(_BUFFER))

    async def open(self, connections: int) -> None:
        """Open this many connections."""
        self.loop = asyncio.get_running_loop()
        try:
            self.idle.extend(await asyncio.gather(*(self._connect() for _ in range(connections))))
        except OSError:
            # The requests themselves will meet the same and be counted.
            return

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
        made = self.loop.create_connection(lambda: _Connection(self), self.host, self.port, ssl=self.tls)
        _, connection = await asyncio.wait_for(made, self.timeout)
        return connection

    async def _send_on_new(self, flight: Flight) -> None:
        try:
            connection = await self._connect()
        except TimeoutError:
            end(self, flight, lambda: fail(flight, "no connection in time", gone=True, verdict=TIMEOUT))
        except OSError as error:
            text = f"no connection: {error.strerror or error}"
            end(self, flight, lambda: fail(flight, text, gone=True))
        else:
            connection.send(flight)


class _Connection(asyncio.BufferedProtocol):
    """One kept-alive connection: writes a request, gathers its answer, goes back to the idle ones.

    The methods whose names begin with `on_` are called by the parser, in the midst of `feed_data`; what follows from
    them is done when that is over, because the end of a flight sends the next one.
    """

    def __init__(self, sender: HttpSender) -> None:
        self.sender = sender
        self.flight: Flight | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.parser = httptools.HttpResponseParser(self)
        self.extra = False
        self._clear()

    def _clear(self) -> None:
        self.fields: dict[bytes, bytes] = {}
        self.body: list[bytes] = []
        self.headed = self.complete = self.keep = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.sender.all.add(self)

    def send(self, flight: Flight) -> None:
        sender = self.sender
        self.flight = flight
        self._clear()
        data = sender.encode(flight)
        if sender.timeout is not None:
            self.timer = sender.loop.call_later(sender.timeout, self._expire)
        flight.sent = sender.loop.time() - sender.zero
        self.transport.write(data)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.sender.buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self.parser.feed_data(self.sender.buffer[:nbytes])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                self._end(f"the answer is not HTTP/1.1: {error}", ERROR)
                return
            self.extra = True
        if self.complete:
            self._answered()
        elif self.extra:
            self.transport.abort()

    def on_message_begin(self) -> None:
        # An answer that nobody asked for: the connection cannot be trusted any more.
        self.extra = self.flight is None or self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.headed:  # what comes later are trailers
            self.fields[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self.extra:
            return
        self.status = self.parser.get_status_code()
        if self.status < 200:
            self.fields.clear()  # an interim answer; the real one follows
        else:
            self.headed, self.keep = True, self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self.extra:
            self.body.append(body)

    def on_message_complete(self) -> None:
        self.complete = self.complete or self.headed

    def _answered(self) -> None:
        flight, fields, body = self.flight, self.fields, b"".join(self.body)
        self.flight = None
        if self.timer:
            self.timer.cancel()
        if self.keep and not self.extra:
            self.sender.idle.append(self)
        else:
            self.transport.abort()
        if flight is not None:
            end(self.sender, flight, lambda: _judge(self.sender, flight, self.status, fields, body))

    def _expire(self) -> None:
        self._end("no answer in time", TIMEOUT)

    def _end(self, text: str, verdict: str, gone: bool = False) -> None:
        flight, self.flight = self.flight, None
        self.transport.abort()
        if self.timer:
            self.timer.cancel()
        if flight is not None:
            end(self.sender, flight, lambda: fail(flight, text, gone=gone, verdict=verdict))

    def connection_lost(self, exc: Exception | None) -> None:
        self.sender.all.discard(self)
        endless = self.headed and not self.fields.keys() & {b"content-length", b"transfer-encoding"}
        if self.flight is not None and exc is None and endless:
            self._answered()  # such an answer ends where the connection does
        else:
            self._end("the connection was closed before the answer", ERROR, gone=True)


def _judge(sender: HttpSender, flight: Flight, status: int, fields: dict[bytes, bytes], body: bytes) -> None:
    """Give the flight its verdict by the answer's status, header fields and body."""
    if b"content-encoding" in fields:
        # 32 lets zlib find out which of the two formats it is.
        body = zlib.decompress(body, 32 + zlib.MAX_WBITS)
    split = int(fields.get(b"inference-header-content-length", len(body)))
    if status != 200:
        fail(flight, f"HTTP {status}: {body.decode('utf-8', 'replace')}")
    else:
        header, raw = body[:split], body[split:]
        missing = wire.http_missing(header, raw, sender.elsewhere)
        check(sender.answers, flight, body, missing, lambda: wire.http_outputs(header, raw))
