"""HTTP/2: as much of RFC 9113 as a gRPC client needs, written for few instructions per call.

Header compression is left away on our side, and the peer is told to do without the table that grows with a connection
(SETTINGS_HEADER_TABLE_SIZE 0), so that equal headers are equal bytes and are decoded once.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MOST_STREAMS, _INITIAL_WINDOW, _MAX_FRAME = 1, 2, 3, 4, 5
_REFUSED, _CANCEL = 7, 8
_WINDOW = 2**31 - 1
_BUFFER = 64 * 1024
_SMALLEST_MAX_FRAME, _LARGEST_MAX_FRAME = 2**14, 2**24 - 1
_LARGEST_FRAME = 1024 * 1024
_LARGEST_BLOCK = 1024 * 1024
_IDS = 2**31 - 1
_MOST_MOVES = 3
_SIZES = {RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}


class Call:
    """One request and what came back of it: blocks of headers (the last one are the trailers), and the body.

    It ends with `done(call, error)`; the error is empty if it was answered.
    """

    __slots__ = ("blocks", "body", "connection", "done", "id", "moves", "request", "rest", "window")

    def __init__(self, block: bytes, body: bytes, done: Callable[[Any, str], None]) -> None:
        self.request, self.done = (block, body), done
        self.connection: Http2 | None = None
        self.id = self.window = self.moves = 0
        self.blocks: list[bytes] = []
        self.body = bytearray()
        self.rest = memoryview(b"")


class ProtocolError(Exception):
    """The peer sent what HTTP/2 does not allow; the connection cannot go on."""


class Http2(asyncio.BufferedProtocol):
    """One connection, many calls at once.

    Args:
        lost: called when no further call can be made on it, with the calls that the peer has done nothing for; they
            are to be started on another connection.
        closed: called when it is closed.

    Attributes:
        ready: set when the peer has said what it takes, or that it is none.
        error: why the connection ended.
    """

    def __init__(
        self, lost: Callable[["Http2", list[Call]], None], closed: Callable[["Http2"], None] = lambda _: None
    ) -> None:
        self.lost, self.closed = lost, closed
        self.calls: dict[int, Call] = {}
        self.usable, self.error, self.ready = True, "", asyncio.Event()
        self._next = 1
        self._window, self._initial, self._largest, self._most = 65535, 65535, 16384, _IDS
        self._waiting: deque[Call] = deque()
        self._blocked: list[Call] = []
        self._buffer, self._filled = bytearray(_BUFFER), 0
        self._received, self._greeted = 0, False
        self._headers, self._ends, self._open_block = b"", False, 0
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello: which settings, and how much may be sent to us."""
        self.transport = transport
        wanted = {_HEADER_TABLE_SIZE: 0, _ENABLE_PUSH: 0, _INITIAL_WINDOW: _WINDOW, _MAX_FRAME: _LARGEST_FRAME}
        settings = b"".join(key.to_bytes(2) + value.to_bytes(4) for key, value in wanted.items())
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, settings)
        self.transport.write(hello + _frame(WINDOW_UPDATE, 0, 0, (_WINDOW - 65535).to_bytes(4)))

    def start(self, call: Call) -> None:
        """Send a request; it waits where the peer wants no more at once."""
        call.connection = self
        self._waiting.append(call)
        if self.usable:
            self._start_waiting()
        else:
            self._retire()

    def cancel(self, call: Call) -> None:
        """Give up a call; `done` is not called any more."""
        if self.calls.get(call.id) is call:
            self._reset(call)
            self._forget(call)
            self._start_waiting()
            self._close_if_over()
        elif call in self._waiting:
            self._waiting.remove(call)

    def close(self) -> None:
        """Drop the connection and all calls, without a word."""
        self.calls.clear()
        self._waiting.clear()
        self._blocked.clear()
        if self.transport:
            self.transport.abort()

    def _start_waiting(self) -> None:
        while self._waiting and self.usable and len(self.calls) < self._most:
            self._start(self._waiting.popleft())

    def _start(self, call: Call) -> None:
        call.id, call.window, (block, body) = self._next, self._initial, call.request
        self.calls[call.id] = call
        self._next += 2
        size = len(body)
        head = _frame(HEADERS, END_HEADERS if body else END_HEADERS | END_STREAM, call.id, block)
        if size <= self._largest and size <= call.window and size <= self._window and not self._blocked:
            self._window -= size
            self.transport.write(head + _frame(DATA, END_STREAM, call.id, body) if body else head)
        else:
            self.transport.write(head)
            call.rest = memoryview(body)
            if body:
                self._blocked.append(call)
            self._flush()
        if self._next > _IDS:
            self._retire()

    def _flush(self) -> None:
        """Send what the peer's windows allow; one that it has taken back is below zero, and allows nothing."""
        for call in tuple(self._blocked):
            while (size := min(len(call.rest), self._window, call.window, self._largest)) > 0:
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
        try:
            read = self._read_frames()
        except ProtocolError as error:
            self._end(f"connection: {error}")
            return
        if read:
            self._buffer[: self._filled - read] = self._buffer[read : self._filled]
            self._filled -= read

    def _read_frames(self) -> int:
        """Read all frames that are complete, and return how many bytes they were."""
        buffer, at, filled = self._buffer, 0, self._filled
        while filled - at >= 9:
            size, kind = int.from_bytes(buffer[at : at + 3]), buffer[at + 3]
            if not self._greeted and (kind != SETTINGS or buffer[at + 4] & ACK):
                raise ProtocolError("what answers is not HTTP/2")
            if size > _LARGEST_FRAME:
                raise ProtocolError(f"the server sent a frame of {size} bytes, {_LARGEST_FRAME} are allowed")
            end = at + 9 + size
            if end > filled:
                break
            self._greeted = True
            number = int.from_bytes(buffer[at + 5 : at + 9]) & _IDS
            self._read(kind, buffer[at + 4], number, bytes(memoryview(buffer)[at + 9 : end]))
            at = end
        return at

    def _read(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._open_block and (kind != CONTINUATION or number != self._open_block):
            raise ProtocolError("the server broke off a block of headers")
        if kind == DATA:
            self._count(len(payload))
            payload = _stripped(payload, flags) if flags & PADDED else payload
            if call := self.calls.get(number):
                call.body += payload
                if flags & END_STREAM:
                    self._finish(call, "")
        elif kind in (HEADERS, CONTINUATION):
            self._read_headers(kind, flags, number, payload)
        else:
            self._control(kind, flags, number, payload)

    def _read_headers(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            payload = _stripped(payload, flags) if flags & (PADDED | PRIORITY) else payload
            self._headers, self._ends = b"", bool(flags & END_STREAM)
        elif not self._open_block:
            raise ProtocolError("the server went on with headers that it had not begun")
        self._headers += payload
        if len(self._headers) > _LARGEST_BLOCK:
            raise ProtocolError(f"the server sent more than {_LARGEST_BLOCK} bytes of headers")
        self._open_block = 0 if flags & END_HEADERS else number
        if flags & END_HEADERS and (call := self.calls.get(number)):
            call.blocks.append(self._headers)
            if self._ends:
                self._finish(call, "")

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if len(payload) != _SIZES.get(kind, len(payload)):
            raise ProtocolError(f"the server sent a frame of kind {kind} with {len(payload)} bytes")
        call = self.calls.get(number)
        if kind == SETTINGS and not flags & ACK:
            self._settle(payload)
        elif kind == WINDOW_UPDATE:
            self._widen(number, call, int.from_bytes(payload) & _IDS)
        elif kind == PING and not flags & ACK:
            self.transport.write(_frame(PING, ACK, 0, payload))
        elif kind == RST_STREAM and call:
            error = int.from_bytes(payload)
            if error == _REFUSED and len(self.calls) > 1:
                self._put_back(call)  # it goes again when another call has ended
            else:
                self._finish(call, f"the server reset the call (HTTP/2 error {error})")
        elif kind == GOAWAY:
            last = int.from_bytes(payload[:4]) & _IDS
            for late in reversed([call for call in self.calls.values() if call.id > last]):
                self._put_back(late)
            self._retire()
        elif kind == PUSH_PROMISE:
            raise ProtocolError("the server sent a promise, which it was told not to do")

    def _put_back(self, call: Call) -> None:
        """Let a call that the peer has done nothing for (RFC 9113, 8.7) wait for another turn."""
        self._forget(call)
        call.blocks, call.body = [], bytearray()
        self._waiting.appendleft(call)

    def _widen(self, number: int, call: Call | None, more: int) -> None:
        if not number:
            self._window += more
        elif call:
            call.window += more
        if self._window > _WINDOW or (call and call.window > _WINDOW):
            raise ProtocolError("the server opened a window beyond its largest size")
        self._flush()

    def _settle(self, payload: bytes) -> None:
        if len(payload) % 6:
            raise ProtocolError(f"the server sent settings of {len(payload)} bytes")
        for at in range(0, len(payload), 6):
            key, value = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 6])
            if key == _MOST_STREAMS:
                self._most = value
            elif key == _MAX_FRAME:
                if not _SMALLEST_MAX_FRAME <= value <= _LARGEST_MAX_FRAME:
                    raise ProtocolError(f"the server takes frames of {value} bytes, which is no size of HTTP/2")
                self._largest = value
            elif key == _INITIAL_WINDOW:
                if value > _WINDOW:
                    raise ProtocolError("the server opened a window beyond its largest size")
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
        if call.rest:
            self._reset(call)  # the peer waits for the rest otherwise, and keeps a place for it
        self._forget(call)
        self._start_waiting()
        self._close_if_over()
        call.done(call, error)

    def _reset(self, call: Call) -> None:
        self.transport.write(_frame(RST_STREAM, 0, call.id, _CANCEL.to_bytes(4)))

    def _forget(self, call: Call) -> None:
        del self.calls[call.id]
        if call.rest:
            self._blocked.remove(call)
            call.rest = memoryview(b"")

    def _retire(self) -> None:
        """Start no call any more; those that wait go to another connection, but not from one to the next for ever."""
        self.usable = False
        waiting, self._waiting = [*self._waiting], deque()
        for call in waiting:
            call.moves += 1
        self.lost(self, [call for call in waiting if call.moves <= _MOST_MOVES])
        for call in waiting:
            if call.moves > _MOST_MOVES:
                call.done(call, "connection: GOAWAY")
        self._close_if_over()

    def _close_if_over(self) -> None:
        if not self.usable and not self.calls:
            self.transport.close()

    def _end(self, error: str) -> None:
        self.error = self.error or error
        ended, self.calls = [*self.calls.values(), *self._waiting], {}
        self._waiting.clear()
        self._blocked.clear()
        self._retire()
        self.ready.set()
        self.transport.abort()
        for call in ended:
            call.done(call, self.error)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the calls that have no answer yet."""
        self._end("connection: it was closed before the answer")
        self.closed(self)


def _frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return (len(payload) << 40 | kind << 32 | flags << 24).to_bytes(8)[:5] + number.to_bytes(4) + payload


def _stripped(payload: bytes, flags: int) -> bytes:
    """Return what stands between the priority and the padding."""
    padding = payload[0] if flags & PADDED and payload else 0
    start = (1 if flags & PADDED else 0) + (5 if flags & PRIORITY else 0)
    if start + padding > len(payload):
        raise ProtocolError("the server sent more padding than there is room for")
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
