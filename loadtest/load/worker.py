"""Worker: one process of several that share a load, started by `loadtest.load.workers`.

On its standard input come the length of a package and its own number in one line, the package, and later, in one line,
the moment at which the run begins on the monotonic clock of its machine. The end of that input means that whoever
started it is gone or has enough: it stops sending and ends. To its standard output go lines: `ready` once it has
connected and warmed up, those of the requests, ten times a second how far it is, and at last what it saw as a whole.
"""

import asyncio
import fcntl
import json
import os
import signal
import sys
import traceback
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from loadtest.load import eventloop
from loadtest.load.loop import PATIENCE, Progress
from loadtest.load.share import Share
from loadtest.plan.package import unpack
from loadtest.record.results import Flight, line
from loadtest.send.choice import sending
from modelathe.client import Client
from modelathe.errors import ModelatheError

_PIPE = 2**20
"""Bytes that fit into the pipe before a worker has to wait for its reader; the most that Linux gives to everybody."""


class _Left(Exception):
    """Whoever started this process is gone, or wants no more."""


class _Output:
    """Keeps lines, and writes them to standard output when told to."""

    def __init__(self, worker: int) -> None:
        self.worker, self._lines = worker, list[str]()

    def add(self, flight: Flight) -> None:
        self._lines.append(line(flight, self.worker))

    def say(self, **values: Any) -> None:
        """Write the lines kept so far and one about the worker itself."""
        lines, self._lines = self._lines, []
        data = "".join([*lines, json.dumps(values), "\n"]).encode()
        while data:
            data = data[os.write(1, data) :]


def main() -> None:
    """Send one worker's share of a load."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us says when to end
    with suppress(OSError):  # a user with very many pipes gets no larger ones
        fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, _PIPE)
    with asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
        try:
            runner.run(_work())
        except (_Left, BrokenPipeError):
            os._exit(0)  # what is left would only wait for a server that nobody is interested in any more
        except Exception as error:
            _Output(0).say(**_failure(error))


def _failure(error: Exception) -> dict[str, str]:
    """Return an error as the fields of ours."""
    if isinstance(error, ModelatheError):
        return {key: value for key, value in error.document().items() if key != "exit"}
    place = traceback.extract_tb(error.__traceback__)[-1]
    why = f"a bug in modelathe: {type(error).__name__}: {error}"
    return {
        "kind": "ModelatheError",
        "what": why,
        "where": f"{place.filename}:{place.lineno}",
        "fix": "please report it",
    }


async def _work() -> None:
    orders = asyncio.StreamReader(limit=2**16)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    length, worker = map(int, (await orders.readline()).split())
    load = unpack(await orders.readexactly(length))
    plan, output = load.plan, _Output(worker)
    begin = asyncio.ensure_future(orders.readline())
    with Client(plan.url, PATIENCE, plan.connection) as client, sending(load, client) as sender:
        share = Share(load, sender, worker)
        try:
            await _unless(begin, _warm(share, output))
            await _send(share, float(await begin or _leave()), output, orders)
        finally:
            await sender.close()


async def _warm(share: Share, output: _Output) -> None:
    output.say(ready=True, gone=await share.warm(lambda state: output.say(warming=state.elapsed)))


async def _send(share: Share, zero: float, output: _Output, orders: asyncio.StreamReader) -> None:
    def tick(state: Progress) -> None:
        output.say(ended=state.ended, failed=state.failed, in_flight=state.in_flight, recent=state.recent)

    try:
        await _unless(asyncio.ensure_future(orders.read(1)), share.send(zero, output.add, tick))
    finally:
        output.say(**share.ending().document())


async def _unless(order: "asyncio.Future[bytes]", work: Awaitable[None]) -> None:
    """Do the work, but leave it when the end of the orders comes first."""
    task = asyncio.ensure_future(work)
    either: set[asyncio.Future[Any]] = {order, task}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not task.done() and not order.result():
        task.cancel()
        await asyncio.wait({task})
        _leave()
    await task


def _leave() -> str:
    raise _Left


if __name__ == "__main__":
    main()
