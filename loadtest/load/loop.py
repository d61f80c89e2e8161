"""Loop: one worker's stretch of load over an open sender."""

import asyncio
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loadtest.load.eventloop import Heartbeat
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Chooser, Sequences, in_sequences
from loadtest.record.results import DROPPED, MISMATCH, OK, TIMEOUT, Flight
from loadtest.send.sender import Sender, fail

TICK = 0.1
"""Seconds between two looks at the run: writing results, reporting progress, noticing a dead server."""

GIVE_UP = 2.0
"""Seconds of nothing but broken connections after which the server counts as gone."""

PATIENCE = 30.0
"""Seconds after the end of the sending for which answers are waited for when requests have no timeout."""

GRACE = 5.0
"""Seconds beyond its timeout after which a request counts as lost: whoever sent it should have ended it by then."""

_OTHER_FILES = 64
"""Open files that a client needs beside its connections."""

_RETRY_PAUSE = 0.05
_MOST_RECENT = 100
_MOST_TEXTS = 1000


@dataclass(frozen=True)
class Progress:
    """How far a run is: seconds since its start, requests so far, and `warming` before the counted part.

    `recent` are some of the requests that ended since the last look, each as its latency and its lag in seconds.
    """

    elapsed: float
    ended: int = 0
    failed: int = 0
    in_flight: int = 0
    warming: bool = False
    recent: tuple[tuple[float, float], ...] = ()


class Loop:
    """Sends one worker's share of a plan and hands over every request that ended.

    Args:
        plan: what to send.
        sender: how to send it, open.
        choose: says which payload a request carries.
        duration: seconds of sending; waiting for the last answers comes after.
        record: called with every request that ended.
        worker: which one of `plan.workers` this is.

    Attributes:
        end: seconds after the start at which the last request ended.
        stopped: seconds after the start at which the sending ended; what follows is waiting.
        cpu: seconds of processor time that this process used until then.
        most: open loop: the most requests in flight at once, which the plan says and the limit of open files may lower.
        full: open loop: seconds during which so many were in flight and another was due.
    """

    def __init__(
        self,
        plan: Plan,
        sender: Sender,
        choose: Chooser,
        duration: float,
        record: Callable[[Flight], None],
        worker: int = 0,
    ) -> None:
        self.plan, self.sender, self.choose, self.duration, self.record = plan, sender, choose.pick, duration, record
        self.count = self.ended = self.succeeded = 0
        self.end, self.gone = 0.0, False
        self.cpu = self.stopped = self.full = self._cpu = 0.0
        self._heartbeat: Heartbeat | None = None
        self.errors: Counter[tuple[str, str]] = Counter()
        self.sending = True
        self._recent: list[Flight] = []
        self._worker = worker
        self._limit = plan.share(plan.requests, worker) if plan.requests else None
        sequences = in_sequences(choose.parts, plan.sequence)
        self._sequences = Sequences(choose, plan.sequence, worker, plan.workers) if sequences else None
        self._flying: dict[int, tuple[Flight, float]] = {}  # and when they were handed over
        self._full_since: float | None = None
        self._failing_since: float | None = None
        self.most = max(1, min(plan.in_flight, _descriptors() - _OTHER_FILES))
        self._due: Iterator[float] = iter(())
        self._next: float | None = None

    async def run(self, tick: Callable[[Progress], None], zero: float | None = None) -> None:
        """Send for `duration`, wait for the last answers, and leave nothing in flight.

        Args:
            tick: called about ten times a second.
            zero: the start of the run on the system's monotonic clock, for workers that begin together; now if None.
        """
        self.loop = asyncio.get_running_loop()
        self.sender.finished = self._finished
        self._zero = self.loop.time() if zero is None else zero
        await asyncio.sleep(max(0.0, self._zero - self.loop.time()))
        self.sender.start(self._zero)
        self._heartbeat, self._cpu = Heartbeat(self.loop), time.process_time()
        try:
            await self._send_and_wait(tick)
        finally:
            # When this was cancelled, a timer is still set, and the sender is about to be closed.
            self.sending = False
            self._heartbeat.stop()
        self.end = self._now()

    async def _send_and_wait(self, tick: Callable[[Progress], None]) -> None:
        if self.plan.open:
            self._due = self.plan.due(self.duration, self._worker)
            self._next = next(self._due, None)
            self._pump()
        else:
            for _ in range(self.plan.share(self.plan.concurrency or 0, self._worker)):
                self._send_if_sending()
        while self.sending or self._flying:
            now = self._now()
            if self.sending and (now >= self.duration or self.gone or self._sent_all()):
                self._stop_sending()
            self._abandon(now)
            # The last answers are waited for in short steps, so that `end` is near the last of them.
            rest = self.duration - now if self.sending else TICK / 10
            await asyncio.sleep(max(0.0, min(TICK, rest)))
            tick(self._progress())
        self._drop_the_rest()  # now that no answer is waited for: counting a million takes a quarter of a second

    def lag(self) -> dict[str, float | None]:
        """Return how late answers were taken in while it sent: milliseconds by percentile, empty before the start."""
        return self._heartbeat.milliseconds() if self._heartbeat else {}

    def _progress(self) -> Progress:
        ended, self._recent = self._recent, []
        recent = tuple(
            (flight.done - flight.planned, flight.sent - flight.planned)
            for flight in ended[:: len(ended) // _MOST_RECENT + 1]
            if flight.done is not None and flight.sent is not None
        )
        return Progress(self._now(), self.ended, self.ended - self.succeeded, len(self._flying), recent=recent)

    def _now(self) -> float:
        return self.loop.time() - self._zero

    def _sent_all(self) -> bool:
        if self.plan.trace is not None and self._next is None:
            return True  # a trace may end before the duration does
        return self._limit is not None and self.count >= self._limit

    def _stop_sending(self) -> None:
        if not self.gone:
            self._pump()
        self._make_room()
        self.sending, self.stopped = False, self._now()
        self.cpu = time.process_time() - self._cpu
        if self._heartbeat:
            self._heartbeat.stop()

    def _drop_the_rest(self) -> None:
        """Write down, as one record, the requests that were due and could not be sent any more."""
        if self._next is None:
            return
        first = last = self._next
        count = 1
        for due in self._due:
            last, count = due, count + 1
        flight = Flight(self._number(), first, 0, verdict=DROPPED, count=count, until=last)
        self.count += count - 1
        self._next = None
        self.record(flight)

    def _abandon(self, now: float) -> None:
        """Give up the requests that their sender should have ended by now, so that a run always ends."""
        timeout = self.plan.timeout
        if timeout is None and (self.sending or now <= self.stopped + PATIENCE):
            return
        for flight, since in tuple(self._flying.values()):
            if timeout is None:
                text = f"no answer within {PATIENCE:g} s of the end of the run"
            elif now > (since if flight.sent is None else flight.sent) + timeout + GRACE:
                text = f"no answer within {GRACE:g} s of its timeout"
            else:
                break  # they stand in the order in which they were handed over
            flight.done = now
            fail(flight, text, verdict=TIMEOUT)
            self._ended(flight)

    def _pump(self) -> None:
        """Send everything that is due, and come back when the next request is."""
        while self.sending and self._next is not None and self._next <= self._now():
            if len(self._flying) >= self.most:
                if self._full_since is None:
                    self._full_since = self._now()
                return  # `_ended` comes back here
            self._send(self._next)
            self._next = next(self._due, None)
        if self._next is not None and self.sending:
            self.loop.call_at(self._zero + self._next, self._pump)

    def _make_room(self) -> bool:
        """Return whether a request that is due waits for one in flight to end, and count how long it did."""
        since, self._full_since = self._full_since, None
        if since is not None:
            self.full += self._now() - since
        return since is not None

    def _number(self) -> int:
        self.count += 1
        return self._worker + (self.count - 1) * self.plan.workers

    def _send(self, planned: float) -> None:
        n = self._number()
        turn = self._sequences.next() if self._sequences else None
        flight = Flight(n, planned, turn.payload if turn else self.choose(n), turn=turn)
        self._flying[n] = flight, self._now()
        self.sender.send(flight)

    def _finished(self, flight: Flight) -> None:
        if self._heartbeat and self.sending and flight.sent is not None and flight.done is not None:
            self._heartbeat.note(flight.done - flight.sent)
        if flight.n not in self._flying:
            return  # given up meanwhile
        self._watch(flight)
        if flight.verdict not in (OK, MISMATCH) and flight.tries <= self.plan.retries and self.sending:
            self._send_again(flight)
        else:
            self._ended(flight)

    def _ended(self, flight: Flight) -> None:
        del self._flying[flight.n]
        self._count(flight)
        if self._sequences and flight.turn and flight.verdict in (OK, MISMATCH):
            self._sequences.finished(flight.turn)
        if not self.plan.open:
            self._follow(flight)
        elif self.sending and self._make_room():
            self._pump()

    def _send_again(self, flight: Flight) -> None:
        flight.tries, flight.first = flight.tries + 1, flight.sent if flight.first is None else flight.first
        flight.verdict, flight.error, flight.sent, flight.done, flight.responses = OK, "", None, None, ()
        # Without a pause a refused connection would be tried ten thousand times a second.
        pause = _RETRY_PAUSE if flight.gone else 0.0
        del self._flying[flight.n]
        self._flying[flight.n] = flight, self._now() + pause
        self.loop.call_later(pause, self.sender.send, flight)

    def _count(self, flight: Flight) -> None:
        self.ended += 1
        if flight.first is not None:
            flight.sent = flight.first
        if not self.plan.open and flight.sent is not None:
            flight.planned = flight.sent
        self.record(flight)
        self._recent.append(flight)
        if flight.verdict == OK:
            self.succeeded += 1
        else:
            # Texts with a number in them could be as many as the requests.
            text = flight.error if len(self.errors) < _MOST_TEXTS else "other errors"
            self.errors[flight.verdict, text] += 1

    def _follow(self, flight: Flight) -> None:
        """Let the user whose request ended send the next one of a closed loop."""
        pause = max(self.plan.think, _RETRY_PAUSE if flight.gone else 0.0)
        if pause:
            self.loop.call_later(pause, self._send_if_sending)
        else:
            self._send_if_sending()

    def _send_if_sending(self) -> None:
        if self.sending and not self._sent_all() and self._now() < self.duration:
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
