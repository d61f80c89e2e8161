"""Stream: requests over `ModelStreamInfer`, many on one stream, their answers matched by id.

A decoupled model answers a request with as many responses as it likes. The request is over when the server says that
there are no more. One that does not say it is taken to answer once; if it then answers again, nobody can know
when its requests are over, and they end with their timeout.
"""

import asyncio
from collections import deque
from functools import partial
from itertools import count, cycle
from typing import Any

from loadtest.plan.data.answers import Answers
from loadtest.record.results import TIMEOUT, Flight
from loadtest.send.grpc import SERVICE, channel, explain, judge, metadata
from loadtest.send.sender import Carrier, Encode, end, fail
from modelathe.connection import PLAIN, Connection
from modelathe.outputs import FINAL, is_last

_REMEMBERED = 1000


class StreamSender(Carrier):
    """Ready-made requests, each with an id of its own, in turn over `connection.streams` streams of one channel.

    Args:
        url: `grpc://HOST:PORT` or `grpcs://HOST:PORT`.
        encode, timeout, answers: as in `Carrier`; what is encoded is the serialised message, without an id.
        connection: its streams, certificates, headers and compression.

    Attributes:
        several: whether the server was seen to answer more than once without saying which answer is the last.
    """

    def __init__(
        self,
        url: str,
        encode: Encode,
        timeout: float | None,
        answers: Answers | None = None,
        connection: Connection = PLAIN,
    ) -> None:
        super().__init__(encode, timeout, answers, connection.shared_memory is not None)
        self.url, self.connection = url, connection
        self.ids = count(1)
        self.several = False

    async def open(self, connections: int) -> None:
        """Open the channel; each stream opens with its first request."""
        self.loop = asyncio.get_running_loop()
        self._channel = channel(self.url, self.connection)
        # Without serializers the bytes pass as they are.
        self.call = self._channel.stream_stream(f"{SERVICE}/ModelStreamInfer")
        self._streams = [_Stream(self) for _ in range(self.connection.streams)]
        self._lives = [self.loop.create_task(stream.live()) for stream in self._streams]
        self._next = cycle(self._streams)

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


class _Waiting:
    """A flight whose answer is not there yet, or not all of it."""

    __slots__ = ("flight", "responses", "timer", "times")

    def __init__(self, flight: Flight, timer: asyncio.TimerHandle | None) -> None:
        self.flight, self.timer = flight, timer
        self.responses: list[Any] = []
        self.times: list[float] = []


class _Stream:
    """One stream. gRPC takes one message after the other, so what is to be written stands in a queue."""

    def __init__(self, sender: StreamSender) -> None:
        from google.protobuf.message import DecodeError
        from tritonclient.grpc import service_pb2

        self.sender = sender
        self._no_message, self._parse = DecodeError, service_pb2.ModelStreamInferResponse.FromString
        # The server is to say which response is the last, if need be with an empty one.
        last = service_pb2.ModelInferRequest()
        last.parameters["triton_enable_empty_final_response"].bool_param = True
        self._tell_the_last = last.SerializeToString()
        self._waiting: dict[str, _Waiting] = {}
        self._queue: deque[str] = deque()
        self._unsaid: deque[str] = deque(maxlen=_REMEMBERED)
        self._filled = asyncio.Event()
        self.call: Any = None

    def send(self, flight: Flight) -> None:
        sender, name = self.sender, str(next(self.sender.ids))
        timer = sender.loop.call_later(sender.timeout, self._expire, name) if sender.timeout is not None else None
        self._waiting[name] = _Waiting(flight, timer)
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
                flight = self._waiting[name].flight
                # Fields that are appended count as if the message had been made with them: 3 is the id.
                data = sender.encode(flight) + self._tell_the_last + b"\x1a" + bytes([len(name)]) + name.encode()
                flight.sent = sender.loop.time() - sender.zero
                await call.write(data)
            self._filled.clear()
            await self._filled.wait()

    def _answered(self, message: bytes) -> None:
        answer = self._parse(message)
        name, response = answer.infer_response.id, answer.infer_response
        waiting, said = self._waiting.get(name), FINAL in response.parameters
        if waiting is None:
            # One that came too late, or the next answer to a request that seemed to be over.
            self.sender.several = self.sender.several or (not said and name in self._unsaid)
            return
        if response.outputs:
            waiting.times.append(self.sender.loop.time() - self.sender.zero)
            waiting.responses.append(response)
        if not answer.error_message and not (is_last(response) if said else not self.sender.several):
            return
        if not said:
            self._unsaid.append(name)
        self._take(name)
        end(self.sender, waiting.flight, lambda: self._judge(waiting, answer.error_message, not response.outputs))

    def _judge(self, waiting: "_Waiting", error: str, apart: bool) -> None:
        """Give the verdict; `apart` says that the end of the answer came apart from the last response."""
        if len(waiting.times) > 1 or apart:
            waiting.flight.responses = tuple(waiting.times)
        if error:
            fail(waiting.flight, error)
            return
        for response in waiting.responses:
            response.ClearField("id")  # which differs in equal answers
        raw = b"".join(response.SerializeToString(deterministic=True) for response in waiting.responses)
        judge(self.sender.answers, waiting.flight, waiting.responses, raw, self.sender.elsewhere)

    def _take(self, name: str) -> Flight | None:
        waiting = self._waiting.pop(name, None)
        if waiting is None:
            return None
        if waiting.timer:
            waiting.timer.cancel()
        return waiting.flight

    def _expire(self, name: str) -> None:
        if flight := self._take(name):
            text = "several answers in time, and the server does not say which is the last"
            text = text if self.sender.several else "no answer in time"
            end(self.sender, flight, lambda: fail(flight, text, verdict=TIMEOUT))

    def _broke(self, code: str, details: str) -> None:
        for name in [name for name, one in self._waiting.items() if one.flight.sent is not None]:
            if flight := self._take(name):
                end(self.sender, flight, partial(explain, flight, code, details))
