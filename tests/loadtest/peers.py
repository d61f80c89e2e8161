"""Servers that say exactly the bytes of a test, and a load of one plan against them without the files of a run."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np

from loadtest.load import eventloop
from loadtest.load.loop import Loop
from loadtest.plan.data.answers import Answers
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Chooser, Part
from loadtest.record.results import Flight
from loadtest.send import http2
from loadtest.send.grpc import GrpcSender
from loadtest.send.http import HttpSender
from loadtest.send.sender import Sender

PARTS = [Part("m", [{"x": np.zeros((1, 4), np.float32)}])]
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def http_peer(answer: bytes) -> Talk:
    """Return what answers each request that has no body with these bytes."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(answer)
        writer.close()

    return talk


def grpc_peer(answer: Callable[[int], bytes]) -> Talk:
    """Return what answers the call of each stream with the frames that `answer` makes for its number."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.write(http2._frame(http2.SETTINGS, 0, 0, b""))
            await reader.readexactly(24)
            while True:
                head = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(head[:3]))
                if head[3] == http2.DATA and head[4] & http2.END_STREAM:
                    writer.write(answer(int.from_bytes(head[5:9])))
        writer.close()

    return talk


def trailers(block: bytes) -> Callable[[int], bytes]:
    """Return the answer that is nothing but this block of headers."""
    return lambda number: http2._frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, number, block)


def message(data: bytes) -> Callable[[int], bytes]:
    """Return the answer that is a gRPC message of these bytes, and a status of 0."""

    def answer(number: int) -> bytes:
        head = http2._frame(http2.HEADERS, http2.END_HEADERS, number, http2.block([(":status", "200")]))
        body = http2._frame(http2.DATA, 0, number, b"\0" + len(data).to_bytes(4) + data)
        return head + body + trailers(http2.block([("grpc-status", "0")]))(number)

    return answer


def load(talk: Talk, scheme: str, answers: Answers | None = None, limit: float = 20.0, **plan: Any) -> list[Flight]:
    """Send a plan's load to a peer and return the flights that were recorded, in the order in which they ended.

    Raises:
        TimeoutError: the run did not end within `limit` seconds.
    """

    talking: set[asyncio.Task[Any]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.add(asyncio.ensure_future(talk(reader, writer)))

    async def main() -> list[Flight]:
        server = await asyncio.start_server(tracked, "127.0.0.1", 0)
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = {"duration": 10.0, "concurrency": 1, "warmup": 0.0, "requests": 3, **plan}
        whole = Plan(f"{scheme}://{place}", **settings)
        sender: Sender = GrpcSender(whole.url, lambda flight: b"", whole.timeout, answers)
        if scheme == "http":
            request = b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n"
            sender = HttpSender(place, lambda flight: request, whole.timeout, answers)
        try:
            return await asyncio.wait_for(flights(whole, sender), limit)
        finally:
            await sender.close()
            server.close()
            await asyncio.gather(*talking)
            await asyncio.sleep(0)  # their transports close in the next round

    with asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
        return runner.run(main())


async def flights(plan: Plan, sender: Sender) -> list[Flight]:
    """Run a plan over a sender and return what was recorded."""
    found: list[Flight] = []
    await sender.open(1)
    loop = Loop(plan, sender, Chooser(PARTS, 0), plan.duration, lambda flight: found.append(replace(flight)))
    await loop.run(lambda progress: None)
    return found
