"""Cores: what the server, its backends and this process used of this machine's cores, and what others did."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

from loadtest.load.processes import family
from modelathe.errors import MachineError

BUSY = 0.25
"""The share of the cores that others may use; with more, times are theirs as well as ours."""
_IDLE = ("idle", "iowait", "guest", "guest_nice")


@dataclass(frozen=True)
class Used:
    """Cores that were used on average.

    Args:
        ours: by the server, its backends and this process, which sends the load.
        others: by all else on the cores that this process may use.
        seconds: how long it was looked at.
    """

    ours: float
    others: float
    seconds: float


class Watch:
    """Watches from when it is made.

    Args:
        pid: of the server.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = self._read()

    def used(self) -> Used:
        """Return what was used since."""
        passed, whole, ours = (now - then for now, then in zip(self._read(), self._before, strict=True))
        return Used(ours / passed, max(0.0, whole - ours) / passed, passed)

    def _read(self) -> tuple[float, float, float]:
        allowed = os.sched_getaffinity(0)
        each = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in allowed]
        whole = sum(sum(times) - sum(getattr(times, name, 0.0) for name in _IDLE) for times in each)
        ours = time.process_time()
        for pid in family(self._pid):
            with suppress(psutil.Error):
                spent = psutil.Process(pid).cpu_times()
                ours += spent.user + spent.system
        return time.monotonic(), whole, ours


def check(used: Used, what: str) -> None:
    """Refuse what was measured while others used the cores.

    Raises:
        MachineError: they did.
    """
    cores = len(os.sched_getaffinity(0))
    if used.others > BUSY * cores:
        raise MachineError(
            f"this machine is too busy to measure: {what}, other programs used {used.others:.2g} of {cores} cores",
            fix="end what else runs here, and tune again: what was measured before is kept",
        )
