"""Workers: several processes that share one load, each with an event loop of its own.

They begin together, at one moment of the machine's monotonic clock, once all have connected and warmed up. Their lines
come through pipes, and only whole ones go into the one result file, so that a run that is killed leaves a file that can
be read. A worker ends by itself when whoever started it is gone.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import orjson

from loadtest.load.loop import PATIENCE, Progress
from loadtest.load.share import Ending
from loadtest.plan.plan import Plan
from loadtest.record.results import Writer
from modelathe import errors, interpreter
from modelathe.errors import MachineError, ModelatheError, ServerAbsent

HEAD_START = 0.2
_LAST_WORDS, _LAST_BREATH = 5.0, 1.0
_GRACE = 30.0
_CHUNK = 2**20
_REQUEST = b'{"n":'


class Channel(Protocol):
    """The way to one worker, wherever it runs.

    Attributes:
        clock: how the clock of its machine stands to ours, where that is another one.
    """

    clock: dict[str, Any] | None

    async def begin(self, zero: float) -> None:
        """Let it begin at `zero`, on the monotonic clock of this machine."""

    def blocks(self) -> AsyncIterator[bytes]:
        """Yield what it writes, as it comes, until its end."""

    async def stop(self) -> None:
        """Let it send no more and say what it still has to say; harmless when it has ended."""

    async def close(self) -> str:
        """End it at once, if it has not ended, and return how it ended: a few words, or empty when all went well."""


class Crew:
    """The workers of one run.

    Args:
        plan: the load that they share.
        hire: starts one of them, by its number.
        head_start: seconds between the word to begin and the moment meant, so that every worker is awake by then.
    """

    def __init__(self, plan: Plan, hire: "Hire", head_start: float = HEAD_START) -> None:
        self.plan, self.hire, self.head_start, self.ending = plan, hire, head_start, Ending()
        self.channels: list[Channel] = []
        self._states: dict[int, dict[str, Any]] = {}
        self._ready = [asyncio.Event() for _ in range(plan.workers)]
        self._ended: set[int] = set()
        self._writer: Writer | None = None
        self._following: list[asyncio.Task[None]] = []
        self._warming = 0.0

    async def prepare(self, package: bytes, show: Callable[[Progress], None]) -> None:
        """Start the workers and wait until every one has connected and warmed up.

        Args:
            package: the plan and its traffic, from `loadtest.plan.package`.
            show: called about ten times a second.

        Raises:
            ServerAbsent: the server stopped answering meanwhile.
            MachineError: a worker died.
        """
        for worker in range(self.plan.workers):
            self.channels.append(await self.hire(package, worker))
        self._following = [asyncio.create_task(self._follow(worker)) for worker in range(len(self.channels))]
        ready = [asyncio.create_task(event.wait()) for event in self._ready]
        try:
            while any(not task.done() for task in ready):
                await self._wait(ready)
                show(Progress(self._warming, warming=True))
        finally:
            for task in ready:
                task.cancel()
        if any(state.get("gone") for state in self._states.values()):
            raise ServerAbsent("the server stopped answering during the warm-up", where=self.plan.url)

    async def run(self, zero: float, writer: Writer, tick: Callable[[Progress], None]) -> None:
        """Let all begin at `zero` and take their lines until the last has ended.

        Args:
            zero: on the event loop's clock.
            writer: of the result file.
            tick: called about ten times a second.

        Raises:
            MachineError: a worker died, or did not come to its end.
        """
        loop = asyncio.get_running_loop()
        self._writer = writer
        patience = self.plan.timeout if self.plan.timeout is not None else PATIENCE
        last = zero + self.plan.duration + patience * (self.plan.retries + 1) + _GRACE
        await asyncio.gather(*(channel.begin(zero) for channel in self.channels))
        try:
            while any(not task.done() for task in self._following):
                await self._wait(self._following)
                tick(self._progress(loop.time() - zero))
                if loop.time() > last:
                    raise MachineError("a worker did not come to its end", fix="look after the machine; run it again")
            await asyncio.gather(*self._following)
        except BaseException:
            # What the others have seen until now is worth keeping.
            await self._stop()
            raise

    async def close(self) -> None:
        """End every worker that has not ended by itself."""
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await asyncio.gather(*(channel.close() for channel in self.channels))

    async def _wait(self, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """Wait for some of the tasks, for a tenth of a second at most; a worker that failed is an error."""
        await asyncio.wait([*tasks, *self._following], timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
        for task in self._following:
            if task.done():
                task.result()

    async def _stop(self) -> None:
        async def stop() -> None:
            await asyncio.gather(*(channel.stop() for channel in self.channels))
            await asyncio.wait(self._following)

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop(), _LAST_WORDS)

    async def _follow(self, worker: int) -> None:
        rest = b""
        channel = self.channels[worker]
        async for block in channel.blocks():
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                self._take(worker, whole.split(b"\n"))
        if worker not in self._ended:
            how = await channel.close()
            raise MachineError(f"worker {worker} died{how and ': ' + how}", fix="look after the machine; run it again")

    def _take(self, worker: int, lines: list[bytes]) -> None:
        requests = [line for line in lines if line.startswith(_REQUEST)]
        if requests and self._writer:
            self._writer.lines(b"\n".join(requests) + b"\n")
        for line in lines:
            if not line.startswith(_REQUEST):
                self._heard(worker, orjson.loads(line))

    def _heard(self, worker: int, said: dict[str, Any]) -> None:
        if "kind" in said:
            kind: type[ModelatheError] = getattr(errors, said.pop("kind"))
            raise kind(**said)
        if "warming" in said:
            self._warming = max(self._warming, said["warming"])
        elif "end" in said:
            self.ending.add(said)
            self._ended.add(worker)
        else:
            recent = self._states.get(worker, {}).get("recent", [])
            self._states[worker] = said | {"recent": recent + said.get("recent", [])}
            if "ready" in said:
                self._ready[worker].set()

    def _progress(self, elapsed: float) -> Progress:
        states = list(self._states.values())
        recent = tuple((latency, lag) for state in states for latency, lag in state["recent"])
        for state in states:
            state["recent"] = []
        counts = {key: sum(state.get(key, 0) for state in states) for key in ("ended", "failed", "in_flight")}
        return Progress(elapsed, recent=recent, **counts)


Hire = Callable[[bytes, int], Awaitable[Channel]]
"""Starts a worker, from its package and its number."""


class Process:
    """A worker in a process of its own on this machine."""

    clock: dict[str, Any] | None = None

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def begin(self, zero: float) -> None:
        """Let it begin at `zero`; all processes of a machine share its monotonic clock."""
        await self._tell(f"{zero!r}\n".encode())

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield what it writes, as it comes, until its end."""
        assert self.process.stdout
        while block := await self.process.stdout.read(_CHUNK):
            yield block

    async def stop(self) -> None:
        """Close its input, at which it ends by itself."""
        if self.process.stdin:
            self.process.stdin.close()

    async def close(self) -> str:
        """Close its input, and kill it if it does not heed that."""
        await self.stop()
        try:
            code = await asyncio.wait_for(self.process.wait(), _LAST_BREATH)
        except TimeoutError:
            self.process.kill()
            code = await self.process.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}" if code else ""

    async def _tell(self, data: bytes) -> None:
        assert self.process.stdin
        with contextlib.suppress(ConnectionError):  # it died; the end of its output says so
            self.process.stdin.write(data)
            await self.process.stdin.drain()


async def start(package: bytes, worker: int) -> Process:
    """Start a worker on this machine and hand it its package."""
    process = await asyncio.create_subprocess_exec(
        *interpreter.command("loadtest.load.worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_CHUNK,
        env=interpreter.variables(),
        start_new_session=True,  # Ctrl-C at the terminal is for us; we tell the workers
    )
    started = Process(process)
    await started._tell(f"{len(package)} {worker}\n".encode() + package)
    return started
