"""Drive: send the load that a plan describes and write down what happened to every request.

Closed loop: `concurrency` requests are always in flight. Open loop: requests are due at the times of a schedule,
whatever the server does; one that leaves late still counts its latency from the planned time, and one that could not
leave before the end of the run is written down as dropped.
"""

import asyncio
import importlib.metadata
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from loadtest import eventloop, traffic
from loadtest.answers import Answers
from loadtest.client import Client, Statistics, connect
from loadtest.commandline import version as lathe_version
from loadtest.errors import BadInput, LatheError, ServerAbsent
from loadtest.loop import PATIENCE, Loop, Progress
from loadtest.plan import Plan
from loadtest.results import Writer
from loadtest.senders.choice import sending
from loadtest.tensors import Arrays, TensorSpec
from loadtest.traffic import Part

_FIRST_CONNECTIONS = 16
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
        header = _header(plan, client, parts)
        choose = traffic.Chooser(parts, plan.seed)
        with (
            sending(plan, client, parts, answers) as sender,
            asyncio.Runner(loop_factory=eventloop.fine_loop) as runner,
        ):
            try:
                eventloop.run(runner, sender.open(plan.concurrency or _FIRST_CONNECTIONS))
                if plan.warmup:
                    warmup = Loop(plan, sender, choose, plan.warmup, lambda flight: None)
                    eventloop.run(runner, warmup.run(lambda state: show(Progress(state.elapsed, warming=True))))
                    if warmup.gone:
                        raise ServerAbsent("the server stopped answering during the warm-up", where=plan.url)
                if answers:
                    answers.reset()
                loop = partial(Loop, plan, sender, choose, plan.duration)
                _measure(runner, loop, client, parts, answers, Writer(path, header), show)
            finally:
                runner.run(sender.close())


def _measure(
    runner: asyncio.Runner,
    make: Callable[..., Loop],
    client: Client,
    parts: Sequence[Part],
    answers: Answers | None,
    writer: Writer,
    show: Callable[[Progress], None],
) -> None:
    with writer:
        before = _settled(client, parts)
        loop = make(writer.add)

        def tick(state: Progress) -> None:
            writer.flush()
            show(state)

        cpu, wall = time.process_time(), time.monotonic()
        eventloop.run(runner, loop.run(tick))
        busy = (time.process_time() - cpu) / (time.monotonic() - wall)
        end: dict[str, Any] = {"end": loop.end, "client_cpu": busy, "gone": loop.gone}
        most = loop.errors.most_common(_ERROR_KINDS)
        end["errors"] = [{"verdict": verdict, "text": text, "count": count} for (verdict, text), count in most]
        if answers:
            end |= {"checked": answers.checked, "mismatches": answers.samples}
        try:
            end["server"] = asdict(_settled(client, parts, loop.succeeded, before) - before)
        except LatheError as error:
            end["server"], end["server_error"] = None, error.what
        writer.finish(end)


def _answers(client: Client, plan: Plan, parts: Sequence[Part]) -> Answers | None:
    """Ask the idle server for the right answers, where they are wanted and not known.

    Every part's first payload is sent in any case: one that the server refuses is the user's mistake, and one clear
    line is better than a run full of errors.
    """
    right: dict[int, tuple[Arrays, float]] = {}
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
            "lathe": lathe_version(),
            "python": platform.python_version(),
            "tritonclient": importlib.metadata.version("tritonclient"),
            "server": client.server_version(),
        },
        "clock_start": datetime.now(UTC).isoformat(timespec="milliseconds"),
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


def _settled(client: Client, parts: Sequence[Part], expected: int = 0, since: Statistics | None = None) -> Statistics:
    """Return the server's counts once they stand still: it counts a request a moment *after* it has answered it."""
    deadline = time.monotonic() + _SETTLING
    last = _counted(client, parts)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = _counted(client, parts)
        if now == last and now.success - (since.success if since else 0) >= expected:
            break
        last = now
    return last


def _counted(client: Client, parts: Sequence[Part]) -> Statistics:
    """Return the counts of all models that the traffic goes to, each taken once."""
    models = dict.fromkeys((part.model, part.version) for part in parts)
    return sum((client.statistics(*model) for model in models), Statistics())
