"""Report: what was tuned, for the terminal."""

from typing import TYPE_CHECKING, Any

from loadtest.record.statistics import number
from serve.tuning.confirm import OFF

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("", "threads", "inst.", "batch", "delay", "rate/s", "p50 ms", "p99 ms", "off", "holds")
"""The delay is in µs; latencies are predicted | measured, rate and whether it holds as measured."""


def text(values: dict[str, Any]) -> "RenderableType":
    """Return the document as it is printed."""
    from rich.console import Group
    from rich.text import Text

    from loadtest.record.table import table

    shown = table(*COLUMNS, figures=slice(1, 9))
    for row in values["confirmed"]:
        shown.add_row(*_cells(row))
    at = f"at {number(values['rate'])}/s" if values["rate"] else "at the highest rate"
    head = f"{values['model']}: {values['configurations']} configurations simulated, best {values['goal']} {at}"
    said = Text(f"holds: {values['objective']}; predicted | measured")
    return Group(Text(head, "bold"), said, Text(), shown, Text(), *(Text(line) for line in _end(values)))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    said, seen = row["predicted"], row["measured"]
    late = (f"{number(said['latency_ms'][key])} | {number(seen['latency_ms'][key])}" for key in ("p50", "p99"))
    knobs = (said["threads"], said["instances"], said["max_batch"], said["delay_us"])
    holds = "yes" if seen["holds"] else "NO"
    return (row["name"], *map(str, knobs), number(seen["rate"]), *late, _percent(row["off"]), holds)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share < 10 else "far"


def _end(values: dict[str, Any]) -> list[str]:
    found = []
    for row in values["confirmed"]:
        if row["off"] > OFF:
            found.append(f"{row['name']}: the prediction is off ({_percent(row['off'])}), so it is not applied")
    chosen = values["chosen"]
    if chosen is None:
        return [*found, "no configuration was confirmed: nothing to change"]
    if not values["diff"]:
        return [*found, "today's configuration is the best that was confirmed: nothing to change"]
    return [*found, f"best: {chosen['name']}", "", *values["diff"].splitlines()]
