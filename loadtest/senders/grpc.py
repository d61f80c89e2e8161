"""gRPC: one `ModelInfer` call for each request."""

import asyncio
from typing import Any

from loadtest import wire
from loadtest.answers import Answers
from loadtest.client import is_no_connection
from loadtest.connection import PLAIN, Connection, address
from loadtest.results import TIMEOUT, Flight
from loadtest.senders.sender import Encode, Finished, check, fail

SERVICE = "/inference.GRPCInferenceService"
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcSender:
    """`ModelInfer` calls with ready-made bytes on one channel.

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
        self.url, self.encode, self.timeout, self.answers, self.zero = url, encode, timeout, answers, 0.0
        self.connection = connection
        self.finished: Finished = lambda flight: None
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, connections: int) -> None:
        """Open the channel; gRPC puts all calls on one connection, and more channels were seen to be slower."""
        import grpc.aio
        from google.protobuf.message import DecodeError
        from tritonclient.grpc import service_pb2

        self.loop = asyncio.get_running_loop()
        self._error: type[Any] = grpc.aio.AioRpcError
        self._no_message, self._parse = DecodeError, service_pb2.ModelInferResponse.FromString
        self._channel = channel(self.url, self.connection)
        # Without serializers the bytes pass as they are.
        self._call = self._channel.unary_unary(f"{SERVICE}/ModelInfer")
        self._metadata = metadata(self.connection)

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
            answer = await self._call(data, timeout=self.timeout, metadata=self._metadata)
        except self._error as error:
            flight.done = self.loop.time() - self.zero
            explain(flight, error.code().name, error.details() or "")
        else:
            flight.done = self.loop.time() - self.zero
            self._answered(flight, answer)
        self.finished(flight)

    def _answered(self, flight: Flight, answer: bytes) -> None:
        try:
            response = self._parse(answer)
        except self._no_message:
            fail(flight, "the answer is not a ModelInferResponse")
        else:
            judge(self.answers, flight, response)


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
