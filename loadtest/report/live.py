"""Live: how a run goes on, shown while it does: one line that is redrawn on a terminal, plain lines elsewhere.

It is drawn from the driver's own tick. A thread that redraws would take the interpreter away from the sender at random
moments, and a drawing library takes ten milliseconds for what a line takes one: both would show up as lateness.
"""

import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import numpy as np
from numpy.typing import NDArray

from loadtest.record.statistics import number, percentile
from modelathe import commandline, notebook

if TYPE_CHECKING:
    from loadtest.load.loop import Progress
    from loadtest.plan.plan import Plan

_DRAW_EVERY, _LINE_EVERY = 1.0, 5.0
_CLEAR = "\r\x1b[2K"
SPAN = 5.0
"""Seconds that the figures look back."""


class Latest:
    """The figures of the last seconds."""

    def __init__(self) -> None:
        self._states: deque[Progress] = deque()
        self._recent: deque[NDArray[np.float64]] = deque()

    def add(self, state: "Progress") -> None:
        """Take what a tick says; a new run, as after the warm-up, begins anew."""
        if self._states and state.elapsed < self._states[-1].elapsed:
            self._states.clear()
            self._recent.clear()
        self._states.append(state)
        self._recent.append(np.array(state.recent, float).reshape(-1, 2))
        while self._states[0].elapsed < state.elapsed - SPAN:
            self._states.popleft()
            self._recent.popleft()

    def figures(self) -> dict[str, str]:
        """Return names and values as they are shown; latency and lag are those of a sample of the requests."""
        first, last = self._states[0], self._states[-1]
        since, ended = (first.elapsed, first.ended) if len(self._states) > 1 else (0.0, 0)
        rate = (last.ended - ended) / (last.elapsed - since) if last.elapsed > since else float("nan")
        recent = np.concatenate(self._recent)
        p50, p99 = (percentile(recent[:, 0], percent) * 1e3 for percent in (50, 99))
        return {
            "done": f"{last.ended:,}",
            "failed": f"{last.failed:,}",
            "per second": number(rate),
            "p50": f"{number(p50)} ms",
            "p99": f"{number(p99)} ms",
            "in flight": f"{last.in_flight:,}",
            "lag p99": f"{number(percentile(recent[:, 1], 99) * 1e3)} ms",
        }


@contextmanager
def shown(plan: "Plan", quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """Yield what takes the progress of a run: one line redrawn on a terminal and in a notebook's cell, lines elsewhere.

    Nothing is shown when it is quiet.
    """
    if quiet or commandline.quiet():
        yield lambda state: None
        return
    redraw, terminal = notebook.redrawn(), sys.stderr.isatty()
    latest, drawn = Latest(), 0.0

    def show(state: "Progress") -> None:
        nonlocal drawn
        latest.add(state)
        if abs(state.elapsed - drawn) >= (_DRAW_EVERY if terminal or redraw else _LINE_EVERY):
            drawn = state.elapsed
            if redraw:
                redraw(line(plan, state, latest))
            elif terminal:
                width = shutil.get_terminal_size().columns - 1
                click.echo(f"{_CLEAR}{line(plan, state, latest)[:width]}", nl=False, err=True)
            elif not state.warming:
                click.echo(line(plan, state, latest), err=True)

    try:
        yield show
    finally:
        if terminal:
            click.echo(_CLEAR, nl=False, err=True)


def teller(quiet: bool) -> Callable[[str], None]:
    """Return what tells a line: on standard error, or below the lines before in a notebook's cell; not if `quiet`."""
    redraw, told = None if quiet else notebook.redrawn(), list[str]()

    def tell(text: str) -> None:
        told.append(text)
        if redraw:
            redraw("\n".join(told))
        elif not quiet:
            click.echo(text, err=True)

    return tell


def line(plan: "Plan", state: "Progress", latest: Latest) -> str:
    """Return how far the run is, and the figures of the last seconds."""
    if state.warming:
        return f"warm-up, {state.elapsed:.0f} of {plan.warmup:g} s"
    figures = ", ".join(f"{name} {value}" for name, value in latest.figures().items())
    far = commandline.how_far(min(state.elapsed / plan.duration, 1.0), 0.0, state.elapsed)
    return f"{state.elapsed:.0f} of {plan.duration:g} s ({far}): {figures}"
