"""Drive: send the load that a plan describes and write down what happened to every request.

Closed loop: `concurrency` requests are always in flight. Open loop: requests are due at the times of a schedule,
whatever the server does; one that leaves late still counts its latency from the planned time, and one that could not
leave before the end of the run is written down as dropped.
"""

import asyncio
import importlib.metadata
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from loadtest import eventloop, schedule, wire
from loadtest.answers import Answers
from loadtest.client import Client, Statistics, connect, parse_url
from loadtest.commandline import version as lathe_version
from loadtest.errors import BadInput, LatheError, ServerAbsent, UsageError
from loadtest.results import DROPPED, OK, Flight, Writer
from loadtest.senders import GrpcSender, HttpSender, Sender
from loadtest.tensors import Arrays

TICK = 0.1
"""Seconds between two looks at the run: writing results, reporting progress, noticing a dead server."""

GIVE_UP = 2.0
"""Seconds of nothing but broken connections after which the server counts as gone."""

_FIRST_CONNECTIONS = 16
_PATIENCE = 30.0
_RETRY_PAUSE = 0.05
_SETTLING = 2.0
_MOST_REFERENCES = 64
_ERROR_KINDS = 10
_MOST_TEXTS = 1000


@dataclass(frozen=True)
class Plan:
    """What load to send.

    Args:
        model: its name on the server.
        url: `grpc://HOST:PORT` or `http://HOST:PORT`.
        duration: seconds during which requests are sent.
        concurrency: closed loop, requests always in flight. Exactly one of this and `rate`.
        rate: open loop, requests per second.
        arrival: with `rate`: a name in `schedule.SHAPES`.
        version: of the model; empty lets the server choose.
        seed: of the arrival times.
        timeout: seconds until a request counts as timed out.
        warmup: seconds of the same load before the run, not counted.
        in_flight: open loop: the most requests in flight at once.
    """

    model: str
    url: str
    duration: float
    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "constant"
    version: str = ""
    seed: int = 0
    timeout: float = 30.0
    warmup: float = 1.0
    in_flight: int = schedule.MOST_IN_FLIGHT

    def __post_init__(self) -> None:
        parse_url(self.url)
        if (self.concurrency is None) == (self.rate is None):
            raise UsageError("a plan has either a concurrency or a rate", fix="give one of the two")
        most: dict[str, float | None] = {"duration": None, "timeout": None, "in_flight": None}
        most |= {"concurrency": schedule.MOST_IN_FLIGHT, "rate": schedule.FASTEST}
        for name, limit in most.items():
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value:g}", fix=f"give a {name} above 0")
            if value is not None and limit is not None and value > limit:
                raise UsageError(f"{name} is {value:g}", fix=f"give a {name} of at most {limit:g}; split larger loads")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}", fix="give 0 or a larger whole number")
        if not 0 <= self.warmup < float("inf"):
            raise UsageError(f"warmup is {self.warmup:g}", fix="give 0 or more seconds")
        if self.arrival not in schedule.SHAPES:
            raise UsageError(f"no arrival is called {self.arrival!r}", fix=f"use one of {', '.join(schedule.SHAPES)}")


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds since its start, requests so far, and `warming` before the counted part."""

    elapsed: float
    done: int = 0
    failed: int = 0
    in_flight: int = 0
    warming: bool = False


def run(
    plan: Plan,
    payloads: Sequence[Arrays],
    path: Path,
    progress: Callable[[Progress], None] | None = None,
    tolerance: float | None = None,
) -> None:
    """Send the load and write the result file `path` while it goes on.

    Args:
        plan: the load.
        payloads: the inputs of one request each; they are cycled through.
        path: the result file; an existing one is replaced once the server has answered.
        progress: called about ten times a second, from the thread that sends; it should be quick.
        tolerance: the largest absolute difference between an output under load and the same request's output before the
            run; None leaves the outputs unchecked.

    Raises:
        ServerAbsent: the server was not there when the run began. One that dies later ends the run early instead; the
            file says so.
        RequestRejected: the server calls the payloads wrong.
        ModelMissing: the server does not have the model.
    """
    if not payloads:
        raise BadInput("no payload to send", fix="give at least one request")
    if not path.parent.is_dir():
        raise BadInput("there is no such folder", where=str(path.parent), fix="create it, or write elsewhere")
    work = partial(_drive, plan, payloads, path, progress or (lambda _: None), tolerance)
    if not eventloop.is_running():
        work()
        return
    # A notebook has an event loop of its own in this thread, and two cannot run in one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def _drive(
    plan: Plan,
    payloads: Sequence[Arrays],
    path: Path,
    show: Callable[[Progress], None],
    tolerance: float | None,
) -> None:
    with connect(plan.url, max(plan.timeout, _PATIENCE)) as client:
        # A payload that the server refuses is the user's mistake; better one clear line than a run full of errors.
        client.infer(plan.model, payloads[0], plan.version)
        answers = None
        if tolerance is not None:
            alone = [client.infer(plan.model, inputs, plan.version) for inputs in payloads[:_MOST_REFERENCES]]
            answers = Answers(alone, tolerance)
        header = _header(plan, client, payloads)
        header["plan"]["tolerance"] = tolerance
        sender = _sender(plan, payloads, answers)
        with asyncio.Runner(loop_factory=eventloop.fine_loop) as runner:
            try:
                eventloop.run(runner, sender.open(plan.concurrency or _FIRST_CONNECTIONS))
                if plan.warmup:
                    warmup = _Loop(plan, sender, len(payloads), plan.warmup, lambda flight: None)
                    eventloop.run(runner, warmup.run(lambda state: show(Progress(state.elapsed, warming=True))))
                    if warmup.gone:
                        raise ServerAbsent("the server stopped answering during the warm-up", where=plan.url)
                _measure(runner, plan, sender, client, len(payloads), Writer(path, header), show)
            finally:
                runner.run(sender.close())


def _measure(
    runner: asyncio.Runner,
    plan: Plan,
    sender: Sender,
    client: Client,
    payloads: int,
    writer: Writer,
    show: Callable[[Progress], None],
) -> None:
    with writer:
        before = _settled(client, plan)
        loop = _Loop(plan, sender, payloads, plan.duration, writer.add)

        def tick(state: Progress) -> None:
            writer.flush()
            show(state)

        cpu, wall = time.process_time(), time.monotonic()
        eventloop.run(runner, loop.run(tick))
        busy = (time.process_time() - cpu) / (time.monotonic() - wall)
        end: dict[str, Any] = {"end": loop.end, "client_cpu": busy, "gone": loop.gone}
        most = loop.errors.most_common(_ERROR_KINDS)
        end["errors"] = [{"verdict": verdict, "text": text, "count": count} for (verdict, text), count in most]
        try:
            end["server"] = asdict(_settled(client, plan, loop.succeeded, before) - before)
        except LatheError as error:
            end["server"], end["server_error"] = None, error.what
        writer.finish(end)


def _header(plan: Plan, client: Client, payloads: Sequence[Arrays]) -> dict[str, Any]:
    inputs, _ = client.metadata(plan.model, plan.version)
    first = payloads[0]
    batch = max((len(first[spec.name]) for spec in inputs if spec.batched and spec.name in first), default=1)
    return {
        "plan": asdict(plan) | {"batch": batch, "payloads": len(payloads)},
        "model": plan.model,
        "model_version": client.served_version(plan.model, plan.version),
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


def _sender(plan: Plan, payloads: Sequence[Arrays], answers: Answers | None) -> Sender:
    scheme, address = parse_url(plan.url)
    if scheme == "grpc":
        calls = [wire.grpc_request(plan.model, inputs, plan.version) for inputs in payloads]
        return GrpcSender(address, calls, plan.timeout, answers)
    requests = [wire.http_request(address, plan.model, inputs, plan.version) for inputs in payloads]
    return HttpSender(address, requests, plan.timeout, answers)


def _settled(client: Client, plan: Plan, expected: int = 0, since: Statistics | None = None) -> Statistics:
    """Return the server's counts once they stand still: it counts a request a moment *after* it has answered it."""
    deadline = time.monotonic() + _SETTLING
    last = client.statistics(plan.model, plan.version)
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = client.statistics(plan.model, plan.version)
        if now == last and now.success - (since.success if since else 0) >= expected:
            break
        last = now
    return last


class _Loop:
    """One stretch of load over an open sender.

    Args:
        plan: what to send.
        sender: how to send it.
        payloads: how many there are to cycle through.
        duration: seconds of sending; waiting for the last answers comes after.
        record: called with every request that ended.
    """

    def __init__(
        self, plan: Plan, sender: Sender, payloads: int, duration: float, record: Callable[[Flight], None]
    ) -> None:
        self.plan, self.sender, self.payloads, self.duration, self.record = plan, sender, payloads, duration, record
        self.count = self.in_flight = self.ended = self.succeeded = 0
        self.end, self.gone = 0.0, False
        self.errors: Counter[tuple[str, str]] = Counter()
        self.sending = True
        self._blocked = False
        self._failing_since: float | None = None
        self._cap = min(plan.in_flight, _descriptors() - 64)
        self._due: Iterator[float] = iter(())
        self._next: float | None = None

    async def run(self, tick: Callable[[Progress], None]) -> None:
        """Send for `duration`, wait for the last answers, and leave nothing in flight."""
        self.loop = asyncio.get_running_loop()
        self.sender.finished = self._finished
        self._zero = self.loop.time()
        self.sender.start(self._zero)
        try:
            await self._send_and_wait(tick)
        finally:
            # When this was cancelled, a timer is still set, and the sender is about to be closed.
            self.sending = False
        self.end = self._now()

    async def _send_and_wait(self, tick: Callable[[Progress], None]) -> None:
        if self.plan.rate is not None:
            self._due = schedule.SHAPES[self.plan.arrival](self.plan.rate, self.duration, self.plan.seed)
            self._next = next(self._due, None)
            self._pump()
        else:
            for _ in range(self.plan.concurrency or 0):
                self._send(self._now())
        while self.sending or self.in_flight:
            now = self._now()
            if self.sending and (now >= self.duration or self.gone):
                self._stop_sending()
            # The last answers are waited for in short steps, so that `end` is near the last of them.
            rest = self.duration - now if self.sending else TICK / 10
            await asyncio.sleep(max(0.0, min(TICK, rest)))
            tick(Progress(self._now(), self.ended, self.ended - self.succeeded, self.in_flight))

    def _now(self) -> float:
        return self.loop.time() - self._zero

    def _stop_sending(self) -> None:
        if not self.gone:
            self._pump()
        self.sending = False
        while self._next is not None:
            self.record(Flight(self._number(), self._next, 0, verdict=DROPPED))
            self._next = next(self._due, None)

    def _pump(self) -> None:
        """Send everything that is due, and come back when the next request is."""
        while self.sending and self._next is not None and self._next <= self._now():
            if self.in_flight >= self._cap:
                self._blocked = True
                return  # `_finished` comes back here
            self._send(self._next)
            self._next = next(self._due, None)
        if self._next is not None and self.sending:
            self.loop.call_at(self._zero + self._next, self._pump)

    def _number(self) -> int:
        self.count += 1
        return self.count - 1

    def _send(self, planned: float) -> None:
        n = self._number()
        self.in_flight += 1
        self.sender.send(Flight(n, planned, n % self.payloads))

    def _finished(self, flight: Flight) -> None:
        self.in_flight -= 1
        self.ended += 1
        if self.plan.rate is None and flight.sent is not None:
            flight.planned = flight.sent
        self.record(flight)
        if flight.verdict == OK:
            self.succeeded += 1
        else:
            # Texts with a number in them could be as many as the requests.
            text = flight.error if len(self.errors) < _MOST_TEXTS else "other errors"
            self.errors[flight.verdict, text] += 1
        self._watch(flight)
        if self.plan.rate is None:
            self._again(flight)
        elif self.sending and self._blocked:
            self._blocked = False
            self._pump()

    def _again(self, flight: Flight) -> None:
        if flight.gone:
            # Without a pause a refused connection would be tried ten thousand times a second.
            self.loop.call_later(_RETRY_PAUSE, self._send_if_sending)
        else:
            self._send_if_sending()

    def _send_if_sending(self) -> None:
        if self.sending and self._now() < self.duration:
            self._send(self._now())

    def _watch(self, flight: Flight) -> None:
        if not flight.gone:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = self._now()
        elif self._now() - self._failing_since > GIVE_UP:
            self.gone = True


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10**9 if soft == resource.RLIM_INFINITY else soft
