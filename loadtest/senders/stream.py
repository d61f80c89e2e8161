"""Stream: requests over `ModelStreamInfer`, many on one stream, their answers matched by id."""

import asyncio
from collections import deque
from functools import partial
from itertools import count, cycle
from typing import Any

from loadtest.answers import Answers
from loadtest.connection import PLAIN, Connection
from loadtest.results import Flight
from loadtest.senders.grpc import SERVICE, channel, explain, judge, metadata
from loadtest.senders.sender import Encode, Finished, end, fail


class StreamSender:
    """Ready-made requests, each with an id of its own, in turn over `connection.streams` streams of one channel.

    Args:
        url: `grpc://HOST:PORT` or `grpcs://HOST:PORT`.
        encode: makes the serialised request, without an id.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
        connection: its streams, certificates, headers and compression.
    """

    def __init__(
        self,
        url: str,
        encode: Encode,
        timeout: float | None,
        answers: Answers | None = None,
        connection: Connection = PLAIN,
    ) -> None:
        self.url, self.encode, self.timeout, self.answers, self.zero = url, encode, timeout, answers, 0.0
        self.connection = connection
        self.finished: Finished = lambda flight: None
        self.ids = count(1)

    async def open(self, connections: int) -> None:
        """Open the channel; each stream opens with its first request."""
        self.loop = asyncio.get_running_loop()
        self._channel = channel(self.url, self.connection)
        # Without serializers the bytes pass as they are.
        self.call = self._channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
        self._streams = [_Stream(self) for _ in range(self.connection.streams)]
        self._lives = [self.loop.create_task(stream.live()) for stream in self._streams]
        self._next = cycle(self._streams)

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.zero = zero

    def send(self, flight: Flight) -> None:
        """Hand over to the next stream."""
        next(self._next).send(flight)

    async def close(self) -> None:
        """Close all streams, and with them whatever is still in flight."""
        for stream, life in zip(self._streams, self._lives, strict=True):
            # A call that is cancelled ends its own reads and writes; cancelled from outside, they would go on in the
            # library and complete into a closed event loop.
            (stream.call or life).cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        await self._channel.close()


class _Stream:
    """One stream. gRPC takes one message after the other, so what is to be written stands in a queue."""

    def __init__(self, sender: StreamSender) -> None:
        from google.protobuf.message import DecodeError
        from tritonclient.grpc import service_pb2

        self.sender = sender
        self._no_message, self._parse = DecodeError, service_pb2.ModelStreamInferResponse.FromString
        self._waiting: dict[str, tuple[Flight, asyncio.TimerHandle | None]] = {}
        self._queue: deque[str] = deque()
        self._filled = asyncio.Event()
        self.call: Any = None

    def send(self, flight: Flight) -> None:
        sender, name = self.sender, str(next(self.sender.ids))
        timer = sender.loop.call_later(sender.timeout, self._expire, name) if sender.timeout is not None else None
        self._waiting[name] = flight, timer
        self._queue.append(name)
        self._filled.set()

    async def live(self) -> None:
        """Open the stream when there is something to send, and anew whenever it broke."""
        import grpc.aio

        while True:
            await self._filled.wait()
            call = self.call = self.sender.call(metadata=metadata(self.sender.connection))
            writer = self.sender.loop.create_task(self._write(call))
            code, details = "UNAVAILABLE", "connection: the server ended the stream"
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    self._answered(message)
            except self._no_message:  # whose answer it was is not known either
                code, details = "UNKNOWN", "what came on the stream is not a ModelStreamInferResponse"
            except grpc.aio.AioRpcError as error:
                code, details = error.code().name, error.details() or ""
            finally:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
                call.cancel()
                self.call = None
            self._broke(code, details)

    async def _write(self, call: Any) -> None:
        sender = self.sender
        while True:
            while self._queue:
                name = self._queue.popleft()
                if name not in self._waiting:
                    continue  # timed out before its turn
                flight = self._waiting[name][0]
                # A field that is appended counts as if the message had been made with it: 3 is the id.
                data = sender.encode(flight) + b"\x1a" + bytes([len(name)]) + name.encode()
                flight.sent = sender.loop.time() - sender.zero
                await call.write(data)
            self._filled.clear()
            await self._filled.wait()

    def _answered(self, message: bytes) -> None:
        answer = self._parse(message)
        flight = self._take(answer.infer_response.id)
        if flight is None:
            return  # a second answer, or one that came too late
        end(self.sender, flight, lambda: self._judge(flight, answer))

    def _judge(self, flight: Flight, answer: Any) -> None:
        if answer.error_message:
            fail(flight, answer.error_message)
            return
        response = answer.infer_response
        response.ClearField("id")  # which differs in equal answers
        judge(self.sender.answers, flight, response, response.SerializeToString(deterministic=True))

    def _take(self, name: str) -> Flight | None:
        flight, timer = self._waiting.pop(name, (None, None))
        if timer:
            timer.cancel()
        return flight

    def _expire(self, name: str) -> None:
        if flight := self._take(name):
            end(self.sender, flight, lambda: explain(flight, "DEADLINE_EXCEEDED", ""))

    def _broke(self, code: str, details: str) -> None:
        for name in [name for name, (flight, _) in self._waiting.items() if flight.sent is not None]:
            if flight := self._take(name):
                end(self.sender, flight, partial(explain, flight, code, details))
