"""Drive: send the load that a plan describes and write down what happened to every request.

Closed loop: `concurrency` requests are always in flight. Open loop: requests are due at the times of a schedule,
whatever the server does; one that leaves late still counts its latency from the planned time, and one that could not
leave before the end of the run is written down as dropped.
"""

import asyncio
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from loadtest.load import eventloop, workers
from loadtest.load.loop import PATIENCE, TICK, Progress
from loadtest.load.readings import Readings
from loadtest.load.share import Ending, Share
from loadtest.plan import served, traffic
from loadtest.plan.data.answers import MOST_SAMPLES, Answers, Tolerance
from loadtest.plan.load import Load
from loadtest.plan.package import pack
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.counts import Statistics, counted
from loadtest.record.results import Writer
from loadtest.send.choice import sending
from loadtest.send.sender import Sender
from modelathe.client import Client, connect
from modelathe.commandline import version as modelathe_version
from modelathe.errors import BadInput, MachineError, ModelatheError, ServerAbsent, ServerFault
from modelathe.tensors import Arrays, TensorSpec

_SETTLING = 2.0
_MOST_REFERENCES = 64
_ERROR_KINDS = 10


def run(plan: Plan, parts: Sequence[Part], path: Path, progress: Callable[[Progress], None] | None = None) -> None:
    """Send the load and write the result file `path` while it goes on.

    Args:
        plan: the load.
        parts: the requests that it is made of.
        path: the result file; an existing one is replaced once the server has answered.
        progress: called about ten times a second, from the thread that sends; it should be quick.

    Raises:
        ServerAbsent: the server was not there when the run began. One that dies later ends the run early instead; the
            file says so.
        RequestRejected: the server calls the payloads wrong.
        ModelMissing: the server does not have the model.
    """
    if not parts:
        raise BadInput("no payload to send", fix="give at least one request")
    if plan.trace:
        next(plan.due(plan.duration), None)  # a bad trace is refused before anything is sent
    if not path.parent.is_dir():
        raise BadInput("there is no such folder", where=str(path.parent), fix="create it, or write elsewhere")
    _until(plan.begin)
    work = partial(_drive, plan, parts, path, progress or (lambda _: None))
    if not eventloop.is_running():
        work()
        return
    # A notebook has an event loop of its own in this thread, and two cannot run in one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def _drive(plan: Plan, parts: Sequence[Part], path: Path, show: Callable[[Progress], None]) -> None:
    with connect(plan.url, max(plan.timeout or 0.0, PATIENCE), plan.connection) as client:
        answers = _answers(client, plan, parts)
        if client.binary is False:
            plan = replace(plan, connection=replace(plan.connection, binary=False))
        load, header = Load(plan, parts, answers), _header(plan, client, parts)
        with _crew(load, client) as crew, asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
            try:
                package = b"" if isinstance(crew, Alone) else pack(load)
                eventloop.run(runner, crew.prepare(package, show))
                if clocks := [channel.clock for channel in crew.channels if channel.clock]:
                    header["clocks"] = clocks

                def opened(ahead: float) -> Writer:
                    begins = datetime.now(UTC) + timedelta(seconds=ahead)
                    header["clock_start"] = begins.isoformat(timespec="milliseconds")
                    return Writer(path, header, crew.plan.index or 0)

                _measure(runner, crew, client, load, opened, show)
            finally:
                runner.run(crew.close())


@contextmanager
def _crew(load: Load, client: Client) -> "Iterator[Alone | workers.Crew]":
    """Yield those who send the load: this process, others on this machine, or others on the machines of a cluster."""
    plan = load.plan
    if plan.ray is not None:
        from loadtest.load import ray_workers

        with ray_workers.hiring(plan.ray) as hire:
            yield workers.Crew(plan, hire, ray_workers.HEAD_START)
    elif plan.workers > 1 and plan.index is None:
        yield workers.Crew(plan, workers.start)
    else:
        with sending(load, client) as sender:
            yield Alone(load, sender)


def _measure(
    runner: asyncio.Runner,
    crew: "Alone | workers.Crew",
    client: Client,
    load: Load,
    opened: Callable[[float], Writer],
    show: Callable[[Progress], None],
) -> None:
    """Send, and write down what comes of it; `opened` gives the file of a run that begins in so many seconds."""
    plan, before = load.plan, _settled(client, load.parts)
    ahead = max(crew.head_start, _until(plan.begin))
    begins = time.monotonic() + ahead
    with opened(ahead) as writer:
        readings = Readings(plan.url, {part.model for part in load.parts}, plan.metrics)

        def tick(state: Progress) -> None:
            writer.flush()
            show(state)

        async def watched() -> None:
            zero = max(begins, asyncio.get_running_loop().time())
            watching = asyncio.create_task(readings.run(zero, writer.reading))
            try:
                await crew.run(zero, writer, tick)
            finally:
                watching.cancel()

        cpu = time.process_time()
        eventloop.run(runner, watched())
        ending = crew.ending
        # The process that writes the workers' lines down uses the same cores.
        own = 0.0 if isinstance(crew, Alone) else time.process_time() - cpu
        busy = (ending.cpu + own) / max(ending.sending, TICK)
        end: dict[str, Any] = {"end": ending.end, "client_cpu": busy, "client_cores": _cores(plan), "gone": ending.gone}
        end["loop_lag_ms"] = ending.lag
        if plan.open:
            end["backlog"] = {"most": ending.most, "full": ending.full}
        most = ending.errors.most_common(_ERROR_KINDS)
        end["errors"] = [{"verdict": verdict, "text": text, "count": count} for (verdict, text), count in most]
        if load.answers:
            end |= {"checked": ending.checked, "mismatches": ending.mismatches[:MOST_SAMPLES]}
        end["server"] = None
        try:
            after = _settled(client, load.parts, ending.succeeded, before)
            if before is not None and after is not None:
                end["server"] = asdict(_between(before, after))
        except ModelatheError as error:
            end["server_error"] = error.what
        end["unknown"] = [*client.unknown, *readings.unknown()]
        writer.finish(end)


class Alone:
    """The one worker of this process, when it is the only one here: the same face as `workers.Crew`."""

    head_start = 0.0
    channels: Sequence[workers.Channel] = ()

    def __init__(self, load: Load, sender: Sender) -> None:
        self.plan, self._share = load.plan, Share(load, sender, load.plan.index or 0)

    @property
    def ending(self) -> Ending:
        """What was seen of the run."""
        return self._share.ending()

    async def prepare(self, _: bytes, show: Callable[[Progress], None]) -> None:
        """Connect and warm up."""
        if await self._share.warm(lambda state: show(Progress(state.elapsed, warming=True))):
            raise ServerAbsent("the server stopped answering during the warm-up", where=self.plan.url)

    async def run(self, zero: float, writer: Writer, tick: Callable[[Progress], None]) -> None:
        """Send."""
        await self._share.send(zero, writer.add, tick)

    async def close(self) -> None:
        """Drop all connections."""
        await self._share.sender.close()


def _until(begin: float | None) -> float:
    """Return the seconds until a moment of the wall clock.

    Raises:
        MachineError: it is over.
    """
    left = 0.0 if begin is None else begin - time.time()
    if left < 0:
        raise MachineError(f"the run was to begin {-left:.1f} s ago", fix="name a later --begin-at")
    return left


def _cores(plan: Plan) -> int:
    """Return the cores that the client may use; Ray gives each worker one of its own."""
    if plan.index is not None:
        return 1
    return plan.workers if plan.ray is not None else min(plan.workers, len(os.sched_getaffinity(0)))


def _answers(client: Client, plan: Plan, parts: Sequence[Part]) -> Answers | None:
    """Ask the idle server for the right answers, where they are wanted and not known.

    Every part's first payload is sent in any case: one that the server refuses is the user's mistake, and one clear
    line is better than a run full of errors.
    """
    right: dict[int, tuple[Arrays, Tolerance]] = {}
    in_order = traffic.in_sequences(parts, plan.sequence)
    for first, part in zip(traffic.firsts(parts), parts, strict=True):

        def ask(inputs: Arrays, part: Part = part) -> Arrays:
            return client.infer(part.model, inputs, part.version, sequence=int(in_order))

        alone: Sequence[Arrays] = [ask(part.payloads[0])]
        if part.tolerance is None or part.fresh or (in_order and not part.expected):
            continue
        alone = part.expected or [*alone, *map(ask, part.payloads[1:_MOST_REFERENCES])]
        right |= {first + place: (outputs, part.tolerance) for place, outputs in enumerate(alone) if outputs}
    return Answers(right) if right else None


def _header(plan: Plan, client: Client, parts: Sequence[Part]) -> dict[str, Any]:
    described = [_described(client, part) for part in parts]
    return {
        "plan": plan.document(),
        "parts": described,
        "model": ", ".join(part["model"] for part in described),
        "model_version": ", ".join(part["version"] for part in described),
        "url": plan.url,
        "seed": plan.seed,
        "versions": {
            "modelathe": modelathe_version(),
            "python": platform.python_version(),
            "tritonclient": importlib.metadata.version("tritonclient"),
            "server": client.server_version(),
        },
    }


def _described(client: Client, part: Part) -> dict[str, Any]:
    inputs, _ = client.metadata(part.model, part.version)
    first, sizes = part.payloads[0], [_samples(inputs, payload) for payload in part.payloads]
    return {
        "model": part.model,
        "version": client.served_version(part.model, part.version),
        "weight": part.weight,
        "payloads": len(part.payloads),
        "fresh": part.fresh is not None,
        "batch": sizes[0],
        "batches": sizes if len(set(sizes)) > 1 else None,
        "shapes": {name: list(array.shape) for name, array in first.items()},
        "tolerance": part.tolerance,
    }


def _samples(inputs: Sequence[TensorSpec], payload: Arrays) -> int:
    return max((len(payload[spec.name]) for spec in inputs if spec.batched and spec.name in payload), default=1)


def _settled(
    client: Client, parts: Sequence[Part], expected: int = 0, since: list[Statistics] | None = None
) -> list[Statistics] | None:
    """Return the server's counts once they stand still: it counts a request a moment *after* it has answered it.

    None where the server does not say them.
    """
    deadline = time.monotonic() + _SETTLING
    last = _counted(client, parts)
    while last is not None and time.monotonic() < deadline:
        time.sleep(0.05)
        now = _counted(client, parts)
        if now == last and _successes(now) - _successes(since) >= expected:
            break
        last = now
    return last


def _counted(client: Client, parts: Sequence[Part]) -> list[Statistics] | None:
    """Return the counts of each model that the traffic goes to."""
    models = dict.fromkeys((part.model, part.version) for part in parts)
    found = [(counted(client, *model), served.probes(client.url, model[0])) for model in models]
    known = [replace(one, probes=probes) for one, probes in found if one is not None]
    return known if len(known) == len(found) else None


def _successes(counts: list[Statistics] | None) -> int:
    return sum(one.success for one in counts or ())


def _between(before: list[Statistics], after: list[Statistics]) -> Statistics:
    """Return what all models counted between two looks.

    Raises:
        ServerFault: a model was loaded anew meanwhile, and has counted from 0 again.
    """
    found = [now - then for now, then in zip(after, before, strict=True)]
    if not all(one.possible for one in found):
        raise ServerFault("a model was loaded anew during the run, and its counts began at 0 again")
    return sum(found, Statistics())
