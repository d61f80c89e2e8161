"""Eventloop: an asyncio loop that is punctual enough for a load generator and ends in order when it is told to."""

import asyncio
import select
import selectors
import signal
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import accumulate
from math import ceil, exp, log
from typing import Any

from loadtest.record.statistics import ranks
from modelathe.errors import Stopped

_FINE = 0.003
"""Seconds before a timer from which on the wait is exact."""


class _FineSelector(selectors.EpollSelector):
    """Waits with microseconds; epoll itself rounds every wait up to a whole millisecond, which would be all our lag."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > _FINE:
            # Far from the next timer one call is enough; the loop comes back for the rest.
            return super().select((int(timeout * 1000) - 1) / 1000)
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)
            timeout = 0
        return super().select(timeout)


class Heartbeat:
    """Measures how late the running event loop takes in answers, which their latency includes.

    Where an answer is taken in before a beat that was due earlier, the loop did something else since then, or its
    process was not given the processor, and the answer may have waited as long. What is shorter than the time between
    two beats is not seen: they follow each other in a fiftieth of the latencies, at once of a shorter one and slowly of
    longer ones, so that slow requests do not hide what quick ones beside them wait for. A thousand beats a second would
    take a twentieth of a core, which on a small machine is the server's.
    """

    FASTEST, SLOWEST = 0.001, 0.02
    """Seconds between two beats."""
    _SHARE, _SLOWLY, _BIN = 0.02, 0.01, 0.05

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._late = loop, Counter[int]()
        self._every = self.FASTEST
        self._due = loop.time() + self._every
        self._timer = loop.call_at(self._due, self._beat)

    def stop(self) -> None:
        """Beat no more; harmless when it does not."""
        self._timer.cancel()

    def note(self, latency: float) -> None:
        """Count how late an answer is taken in now, that took so many seconds in all."""
        every = min(max(latency * self._SHARE, self.FASTEST), self.SLOWEST)
        self._every = min(every, self._every + (every - self._every) * self._SLOWLY)
        late = max(self._loop.time() - self._due, 1e-6)
        self._late[ceil(log(late) / self._BIN)] += 1

    def milliseconds(self) -> dict[str, float | None]:
        """Return `p99`, `p999` and `max` over the answers, to within 5 %; None where there was none."""
        bins = sorted(self._late)
        reached = list(accumulate(self._late[one] for one in bins))
        found: dict[str, float | None] = {}
        for key, percent in (("p99", 99.0), ("p999", 99.9), ("max", 100.0)):
            rank = int(ranks(reached[-1], percent)) + 1 if reached else 0
            found[key] = exp(bins[bisect_left(reached, rank)] * self._BIN) * 1e3 if reached else None
        return found

    def _beat(self) -> None:
        self._due = self._loop.time() + self._every
        self._timer = self._loop.call_at(self._due, self._beat)


def fine_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop whose timers are exact to the microseconds that the machine allows."""
    return asyncio.SelectorEventLoop(_FineSelector())


def is_running() -> bool:
    """Whether this thread is already inside an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run(runner: asyncio.Runner, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`.

    Raises:
        Stopped: a SIGTERM came meanwhile; `work` was cancelled and has cleaned up.
        KeyboardInterrupt: likewise for Ctrl-C.
    """
    main: list[asyncio.Task[None] | None] = []

    async def whole() -> None:
        main.append(asyncio.current_task())
        await work

    with _sigterm(runner.get_loop(), main) as was_stopped:
        try:
            runner.run(whole())
        except asyncio.CancelledError:
            if was_stopped():
                raise Stopped("stopped by SIGTERM", fix="run it again") from None
            raise


@contextmanager
def _sigterm(loop: asyncio.AbstractEventLoop, main: list["asyncio.Task[None] | None"]) -> Iterator[Callable[[], bool]]:
    # Raised inside a callback of the event loop, the exception of the command line's own handler would be swallowed.
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def cancel() -> None:
        received.append(signal.SIGTERM)
        for task in filter(None, main):
            task.cancel()

    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, cancel)
    try:
        yield lambda: bool(received)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
