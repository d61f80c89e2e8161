"""HTTP/2: as much of RFC 9113 as a gRPC client needs, written for few instructions per call.

Header compression is left away on our side, and the peer is told to do without the table that grows with a connection
(SETTINGS_HEADER_TABLE_SIZE 0), so that equal headers are equal bytes and are decoded once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MOST_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 2, 3, 4, 5
_REFUSED, _CANCEL = 7, 8
_WINDOW = 2**31 - 1
_BUFFER = 64 * 1024
_LARGEST_FRAME = 1024 * 1024
_IDS = 2**31 - 1


class Call:
    """One request and what came back of it: blocks of headers (the last one are the trailers), and the body."""

    __slots__ = ("blocks", "body", "done", "id", "request", "rest", "window")

    def __init__(self, request: tuple[bytes, bytes], done: Callable[["Call", str], None]) -> None:
        self.request, self.done, self.id, self.window = request, done, 0, 0
        self.blocks: list[bytes] = []
        self.body = bytearray()
        self.rest = memoryview(b"")


class Http2(asyncio.BufferedProtocol):
    """One connection, many calls at once. A call ends with `done(call, error)`; the error is empty if it was answered.

    Args:
        lost: called when no further call can be made on it.

    Attributes:
        ready: set when the peer has said what it takes, or that it is none.
        error: why the connection ended.
    """

    def __init__(self, lost: Callable[["Http2"], None]) -> None:
        self.lost = lost
        self.calls: dict[int, Call] = {}
        self.usable, self.error, self.ready = True, "", asyncio.Event()
        self._next = 1
        self._window, self._initial, self._largest, self._most = 65535, 65535, 16384, _IDS
        self._waiting: deque[Call] = deque()
        self._blocked: list[Call] = []
        self._buffer, self._filled = bytearray(_BUFFER), 0
        self._received, self._greeted = 0, False
        self._headers, self._ends = b"", False
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello: which settings, and how much may be sent to us."""
        self.transport = transport
        wanted = {_HEADER_TABLE_SIZE: 0, _ENABLE_PUSH: 0, _INITIAL_WINDOW: _WINDOW, _MAX_FRAME: _LARGEST_FRAME}
        settings = b"".join(key.to_bytes(2) + value.to_bytes(4) for key, value in wanted.items())
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, settings)
        self.transport.write(hello + _frame(WINDOW_UPDATE, 0, 0, (_WINDOW - 65535).to_bytes(4)))

    def call(self, block: bytes, body: bytes, done: Callable[[Call, str], None]) -> Call:
        """Send a request; it waits where the peer wants no more at once."""
        call = Call((block, body), done)
        self._waiting.append(call)
        self._start_waiting()
        return call

    def cancel(self, call: Call) -> None:
        """Give up a call; `done` is not called any more."""
        if self.calls.pop(call.id, None):
            if call.rest:
                self._blocked.remove(call)
            self.transport.write(_frame(RST_STREAM, 0, call.id, _CANCEL.to_bytes(4)))
            self._start_waiting()
        elif call in self._waiting:
            self._waiting.remove(call)

    def close(self) -> None:
        """Drop the connection and all calls, without a word."""
        self.calls.clear()
        self._waiting.clear()
        if self.transport:
            self.transport.abort()

    def _start_waiting(self) -> None:
        while self._waiting and len(self.calls) < self._most:
            self._start(self._waiting.popleft())

    def _start(self, call: Call) -> None:
        call.id, call.window, (block, body) = self._next, self._initial, call.request
        self.calls[call.id] = call
        self._next += 2
        if self._next > _IDS:
            self._retire()
        head, size = _frame(HEADERS, END_HEADERS, call.id, block), len(body)
        if size <= self._largest and size <= call.window and size <= self._window and not self._blocked:
            self._window -= size
            self.transport.write(head + _frame(DATA, END_STREAM, call.id, body))
            return
        self.transport.write(head)
        call.rest = memoryview(body)
        self._blocked.append(call)
        self._flush()

    def _flush(self) -> None:
        """Send what the peer's windows allow."""
        for call in tuple(self._blocked):
            while size := min(len(call.rest), self._window, call.window, self._largest):
                last = size == len(call.rest)
                self.transport.write(_frame(DATA, END_STREAM if last else 0, call.id, bytes(call.rest[:size])))
                call.rest = call.rest[size:]
                self._window -= size
                call.window -= size
            if not call.rest:
                self._blocked.remove(call)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        if self._filled == len(self._buffer):
            # A view of the old one may still be out, so it cannot be resized.
            grown = bytearray(2 * self._filled)
            grown[: self._filled] = self._buffer
            self._buffer = grown
        return memoryview(self._buffer)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Read the frames that are complete."""
        self._filled += nbytes
        buffer, at, filled = self._buffer, 0, self._filled
        while filled - at >= 9:
            end = at + 9 + int.from_bytes(buffer[at : at + 3])
            if not self._greeted and buffer[at + 3] != SETTINGS:
                self._end("connection: what answers is not HTTP/2")
                return
            if end > filled:
                break
            self._greeted = True
            number = int.from_bytes(buffer[at + 5 : at + 9]) & _IDS
            self._read(buffer[at + 3], buffer[at + 4], number, bytes(memoryview(buffer)[at + 9 : end]))
            at = end
        if at:
            buffer[: filled - at] = buffer[at:filled]
            self._filled = filled - at

    def _read(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == DATA:
            self._count(len(payload))
            if call := self.calls.get(number):
                call.body += _stripped(payload, flags) if flags & PADDED else payload
                if flags & END_STREAM:
                    self._finish(call, "")
        elif kind in (HEADERS, CONTINUATION):
            if kind == HEADERS:
                payload = _stripped(payload, flags) if flags & (PADDED | PRIORITY) else payload
                self._ends = bool(flags & END_STREAM)
            # No other frame may come between the pieces of one block.
            self._headers += payload
            if flags & END_HEADERS:
                block, self._headers = self._headers, b""
                if call := self.calls.get(number):
                    call.blocks.append(block)
                    if self._ends:
                        self._finish(call, "")
        else:
            self._control(kind, flags, number, payload)

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        call = self.calls.get(number)
        if kind == SETTINGS and not flags & ACK:
            self._settle(payload)
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload) & _IDS
            if not number:
                self._window += more
            elif call:
                call.window += more
            self._flush()
        elif kind == PING and not flags & ACK:
            self.transport.write(_frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM and call and int.from_bytes(payload) == _REFUSED and len(self.calls) > 1:
            # The peer has done nothing for it (RFC 9113, 8.7): it goes again when another call has ended.
            self._forget(call)
            self._waiting.appendleft(call)
        elif kind == RST_STREAM and call:
            self._finish(call, f"the server reset the call (HTTP/2 error {int.from_bytes(payload)})")
        elif kind == GOAWAY:
            self._retire()
            last = int.from_bytes(payload[:4]) & _IDS
            for late in [call for call in self.calls.values() if call.id > last]:
                self._finish(late, "connection: GOAWAY")

    def _settle(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            key, value = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 6])
            if key == _MOST_STREAMS:
                self._most = value
            elif key == _MAX_FRAME:
                self._largest = value
            elif key == _INITIAL_WINDOW:
                for call in self.calls.values():
                    call.window += value - self._initial
                self._initial = value
        self.transport.write(_frame(SETTINGS, ACK, 0, b""))
        self.ready.set()
        self._flush()
        self._start_waiting()

    def _count(self, size: int) -> None:
        """Let the peer send on; a call's own window is larger than any answer."""
        self._received += size
        if self._received > _WINDOW // 2:
            self.transport.write(_frame(WINDOW_UPDATE, 0, 0, self._received.to_bytes(4)))
            self._received = 0

    def _finish(self, call: Call, error: str) -> None:
        self._forget(call)
        self._start_waiting()
        call.done(call, error)

    def _forget(self, call: Call) -> None:
        del self.calls[call.id]
        if call.rest:
            self._blocked.remove(call)
            call.rest = memoryview(b"")

    def _retire(self) -> None:
        if self.usable:
            self.usable = False
            self.lost(self)

    def _end(self, error: str) -> None:
        self.error = self.error or error
        self._retire()
        self.ready.set()
        self.transport.abort()
        ended, self.calls = [*self.calls.values(), *self._waiting], {}
        self._waiting.clear()
        self._blocked.clear()
        for call in ended:
            call.done(call, self.error)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the calls that have no answer yet."""
        self._end("connection: it was closed before the answer")


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return (len(payload) << 40 | kind << 32 | flags << 24).to_bytes(8)[:5] + number.to_bytes(4) + payload


def _stripped(payload: bytes, flags: int) -> bytes:
    """Return what stands between the priority and the padding."""
    padding = payload[0] if flags & PADDED else 0
    start = (1 if flags & PADDED else 0) + (5 if flags & PRIORITY else 0)
    return payload[start : len(payload) - padding]


def block(headers: Sequence[tuple[str, str]]) -> bytes:
    """Return headers as the bytes of a HEADERS frame: literals, none of them to be remembered (RFC 7541, 6.2.2)."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(value: str) -> bytes:
    data, rest = value.encode(), len(value.encode()) - 127
    if rest < 0:
        return bytes([len(data)]) + data
    length = bytearray([127])
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + data


@lru_cache(maxsize=1024)  # answers have few different headers
def fields(data: bytes) -> dict[str, str]:
    """Return the headers of a block; a decoder of its own, because the peer was told to keep no table."""
    from hpack import Decoder

    return {str(name): str(value) for name, value in Decoder().decode(data)}
