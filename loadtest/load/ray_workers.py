"""Ray: workers on the machines of a Ray cluster, with their clocks aligned to ours.

An actor on each machine starts the same worker process as `loadtest.load.workers` does here, and passes its lines on.
The monotonic clocks of two machines have nothing to do with each other, so each actor is asked for its own a few times:
the quickest answer says where its clock stands, to within half of the time that the answer took. Modelathe must be
installed, in the same version, on every machine of the cluster, and a trace must lie at the same path.

It was run with several workers on one machine only.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from loadtest.load import workers
from modelathe import interpreter
from modelathe.commandline import install_line
from modelathe.errors import MachineError, UsageError

LOCAL = "local"
"""The address that starts a cluster on this machine instead of joining one."""
HEAD_START = 1.0
"""Seconds between the word to begin and the moment meant; it must reach every machine by then."""
_ROUNDS = 20


class Relay:
    """A worker beside this actor, and the way to it. Every method runs on the actor's event loop."""

    async def start(self, package: bytes, worker: int) -> str:
        """Start the worker and return the name of its machine."""
        self._process = await workers.start(package, worker)
        self._blocks = self._process.blocks()
        return socket.gethostname()

    async def clock(self) -> float:
        """Return the seconds of this machine's monotonic clock."""
        return time.monotonic()

    async def begin(self, zero: float) -> None:
        """Let it begin at `zero`, on this machine's clock."""
        await self._process.begin(zero)

    async def read(self) -> bytes:
        """Return what it wrote since the last time, once there is something; nothing at its end."""
        return await anext(self._blocks, b"")

    async def stop(self) -> None:
        """Let it say what it still has to say."""
        await self._process.stop()

    async def close(self) -> str:
        """End it and return how it ended."""
        return await self._process.close()


class Remote:
    """A `workers.Channel` to an actor.

    Attributes:
        clock: the worker's `host`, and by how many seconds its clock is ahead of ours, give or take how many.
    """

    def __init__(self, actor: Any, worker: int) -> None:
        self.actor, self.worker = actor, worker
        self.clock: dict[str, Any] | None = None

    async def start(self, package: bytes) -> None:
        """Start the worker and learn where its clock stands."""
        host = await self.actor.start.remote(package, self.worker)
        offset, uncertainty = await offset_of(self.actor.clock.remote)
        self.clock = {"worker": self.worker, "host": host, "offset": offset, "uncertainty": uncertainty}

    async def begin(self, zero: float) -> None:
        """Let it begin at our `zero`."""
        assert self.clock
        await self.actor.begin.remote(zero + self.clock["offset"])

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yield what it writes; the death of its machine is the end of that."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            while block := await self.actor.read.remote():
                yield block

    async def stop(self) -> None:
        """Let it send no more."""
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):
            await self.actor.stop.remote()

    async def close(self) -> str:
        """End the worker and its actor."""
        import ray
        from ray.exceptions import RayError

        try:
            how = str(await asyncio.wait_for(self.actor.close.remote(), 10))
        except (RayError, TimeoutError):
            how = "its machine or its actor is gone"
        ray.kill(self.actor)
        return how


async def offset_of(ask: Any, rounds: int = _ROUNDS) -> tuple[float, float]:
    """Return by how many seconds another monotonic clock is ahead of ours, and how far off that may be.

    Args:
        ask: asks for the other clock's seconds; awaited.
        rounds: how often it is asked; the quickest answer counts.
    """
    found = []
    for _ in range(rounds):
        before = time.monotonic()
        there = await ask()
        after = time.monotonic()
        found.append(((after - before) / 2, there - (before + after) / 2))
    uncertainty, offset = min(found)
    return offset, uncertainty


@contextmanager
def hiring(address: str) -> Iterator[workers.Hire]:
    """Join the cluster at `address` and yield what starts a worker on it; each takes one of its CPUs.

    Raises:
        UsageError: Ray is not installed.
        MachineError: there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise UsageError("the package ray is not installed", fix=install_line("ray")) from None
    own = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here = address == LOCAL
    # A cluster that we start has no Modelathe installed but ours.
    variables = {"PYTHONPATH": interpreter.path()} if here else {}
    try:
        ray.init(
            None if here else address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": variables},
            **({"include_dashboard": False} if here else {}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise MachineError(f"no Ray cluster: {error}", where=address, fix="start one with: ray start --head") from error
    finally:
        signal.signal(signal.SIGTERM, own)  # Ray puts its own in its place
    actor = ray.remote(num_cpus=1, max_restarts=0)(Relay)

    async def hire(package: bytes, worker: int) -> workers.Channel:
        remote = Remote(actor.remote(), worker)
        await remote.start(package)
        return remote

    try:
        yield hire
    finally:
        ray.shutdown()
