"""Live: how a run goes on, shown while it does: a few figures redrawn on a terminal, plain lines elsewhere.

It is drawn from the driver's own tick. A thread that redraws would take the interpreter away from the sender at random
moments, and show up as lateness.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import numpy as np

from loadtest.report import number
from loadtest.statistics import percentile

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from loadtest.loop import Progress
    from loadtest.plan import Plan

_DRAW_EVERY, _LINE_EVERY = 1.0, 5.0
SPAN = 5.0
"""Seconds that the figures look back."""


class Latest:
    """The figures of the last seconds."""

    def __init__(self) -> None:
        self._states: deque[Progress] = deque()

    def add(self, state: "Progress") -> None:
        """Take what a tick says; a new run, as after the warm-up, begins anew."""
        if self._states and state.elapsed < self._states[-1].elapsed:
            self._states.clear()
        self._states.append(state)
        while self._states[0].elapsed < state.elapsed - SPAN:
            self._states.popleft()

    def figures(self) -> dict[str, str]:
        """Return names and values as they are shown; latency and lag are those of a sample of the requests."""
        first, last = self._states[0], self._states[-1]
        begun = first if len(self._states) > 1 else None
        seconds = last.elapsed - (begun.elapsed if begun else 0.0)
        rate = (last.done - (begun.done if begun else 0)) / seconds if seconds > 0 else float("nan")
        recent = np.array([pair for state in self._states for pair in state.recent]).reshape(-1, 2)
        p50, p99 = (percentile(recent[:, 0], percent) * 1e3 for percent in (50, 99))
        return {
            "done": f"{last.done:,}",
            "failed": f"{last.failed:,}",
            "per second": number(rate),
            "p50": f"{number(p50)} ms",
            "p99": f"{number(p99)} ms",
            "in flight": f"{last.in_flight:,}",
            "lag p99": f"{number(percentile(recent[:, 1], 99) * 1e3)} ms",
        }


@contextmanager
def shown(plan: "Plan", quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """Yield what takes the progress of a run: a redrawn panel on a terminal, lines elsewhere, nothing when quiet."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield (lambda state: None) if quiet else _lines(plan)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        latest, drawn = Latest(), -1.0

        def show(state: "Progress") -> None:
            nonlocal drawn
            latest.add(state)
            if abs(state.elapsed - drawn) >= _DRAW_EVERY:
                drawn = state.elapsed
                live.update(panel(plan, state, latest.figures(), console), refresh=True)

        yield show


def panel(plan: "Plan", state: "Progress", figures: dict[str, str], console: "Console") -> "RenderableType":
    """Return what a terminal shows: how far the run is, and the figures of the last seconds below."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    whole = plan.warmup if state.warming else plan.duration
    head = Table.grid(padding=(0, 1))
    head.add_row(
        "warm-up" if state.warming else "sending",
        ProgressBar(total=whole, completed=min(state.elapsed, whole), width=max(10, min(40, console.width - 30))),
        f"{min(state.elapsed, whole):.0f} of {whole:g} s",
    )
    if state.warming:
        return head
    table = Table(*figures, box=None, pad_edge=False, header_style="dim")
    table.add_row(*figures.values())
    return Group(head, table)


def _lines(plan: "Plan") -> "Callable[[Progress], None]":
    last, latest = 0.0, Latest()

    def show(state: "Progress") -> None:
        nonlocal last
        if state.warming:
            return
        latest.add(state)
        if state.elapsed - last >= _LINE_EVERY:
            last = state.elapsed
            figures = ", ".join(f"{name} {value}" for name, value in latest.figures().items())
            click.echo(f"{state.elapsed:.0f} of {plan.duration:g} s: {figures}", err=True)

    return show
