"""Eventloop: an asyncio loop that is punctual enough for a load generator and ends in order when it is told to."""

import asyncio
import select
import selectors
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from loadtest.errors import Stopped

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
