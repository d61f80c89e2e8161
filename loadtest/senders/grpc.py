"""gRPC: one `ModelInfer` call for each request."""

import asyncio
from typing import Any

from loadtest import wire
from loadtest.answers import Answers
from loadtest.client import is_no_connection
from loadtest.results import TIMEOUT, Flight
from loadtest.senders.sender import Encode, Finished, check, fail


class GrpcSender:
    """`ModelInfer` calls with ready-made bytes on one channel.

    Args:
        address: HOST:PORT.
        encode: makes the serialised request.
        timeout: seconds until a request counts as timed out; None waits.
        answers: what to compare the outputs with; None leaves them unchecked.
    """

    def __init__(self, address: str, encode: Encode, timeout: float | None, answers: Answers | None = None) -> None:
        self.address, self.encode, self.timeout, self.answers, self.zero = address, encode, timeout, answers, 0.0
        self.finished: Finished = lambda flight: None
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, connections: int) -> None:
        """Open the channel; gRPC puts all calls on one connection, and more channels were seen to be slower."""
        import grpc.aio
        from tritonclient.grpc import service_pb2

        self.loop = asyncio.get_running_loop()
        self._error: type[Any] = grpc.aio.AioRpcError
        self._parse = service_pb2.ModelInferResponse.FromString
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channel = grpc.aio.insecure_channel(self.address, options=options)
        # Without serializers the bytes pass as they are.
        self._call = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def start(self, zero: float) -> None:
        """Take `zero` as the start of the run."""
        self.zero = zero

    def send(self, flight: Flight) -> None:
        """Start a call."""
        task = self.loop.create_task(self._one(flight))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        """Close the channel, and with it whatever is still in flight."""
        for task in tuple(self._calls):
            task.cancel()
        await self._channel.close()

    async def _one(self, flight: Flight) -> None:
        data = self.encode(flight)
        flight.sent = self.loop.time() - self.zero
        try:
            answer = await self._call(data, timeout=self.timeout)
        except self._error as error:
            flight.done = self.loop.time() - self.zero
            self._explain(flight, error.code().name, error.details() or "")
        else:
            flight.done = self.loop.time() - self.zero
            self._answered(flight, answer)
        self.finished(flight)

    def _explain(self, flight: Flight, code: str, details: str) -> None:
        if code == "DEADLINE_EXCEEDED":
            fail(flight, "no answer in time", verdict=TIMEOUT)
        else:
            fail(flight, f"{code}: {details}", gone=code == "UNAVAILABLE" and is_no_connection(details))

    def _answered(self, flight: Flight, answer: bytes) -> None:
        from google.protobuf.message import DecodeError

        try:
            response = self._parse(answer)
        except DecodeError:
            fail(flight, "the answer is not a ModelInferResponse")
            return
        if not response.outputs:
            fail(flight, "an answer without outputs")
        else:
            raw = b"".join(response.raw_output_contents)
            check(self.answers, flight, raw, lambda: wire.grpc_outputs(response))
