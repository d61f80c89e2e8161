"""Report: what was tuned, for the terminal."""

from collections.abc import Iterator
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
    for row in rows(values):
        shown.add_row(*row)
    said = [Text(line) for line in lines(values)]
    told = [Text(line) for line in end(values)]
    change = [Text(), *map(Text, values["diff"].splitlines())] if values["diff"] else []
    return Group(Text(headline(values), "bold"), *said, Text(), shown, Text(), *told, *change)


def headline(values: dict[str, Any]) -> str:
    """Return what was looked for, in a line."""
    at = f"at {number(values['rate'])}/s" if values["rate"] else "at the highest rate"
    return f"{values['model']}: {values['configurations']} configurations simulated, best {values['goal']} {at}"


def lines(values: dict[str, Any]) -> Iterator[str]:
    """Yield what the figures stand for."""
    yield f"holds: {values['objective']}; predicted | measured"
    yield f"server and the client that sends the load share {values['cores']} cores"


def rows(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield each live run, in `COLUMNS`."""
    for row in values["confirmed"]:
        said, seen = row["predicted"], row["measured"]
        late = (f"{number(said['latency_ms'][key])} | {number(seen['latency_ms'][key])}" for key in ("p50", "p99"))
        knobs = (said["threads"], said["instances"], said["max_batch"], said["delay_us"])
        holds = "yes" if seen["holds"] else "NO"
        yield (row["name"], *map(str, knobs), number(seen["rate"]), *late, percent(row["off"]), holds)


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{share:.0%}" if share < 10 else "far"


def end(values: dict[str, Any]) -> Iterator[str]:
    """Yield what follows."""
    for row in values["confirmed"]:
        if row["off"] > OFF and row["name"] != "today":
            (name, ends), *_ = row["measured"]["interval_ms"].items()
            seen = f"{name} {number(row['measured']['latency_ms'][name])} ms ({' to '.join(map(number, ends))})"
            held = "holds live" if row["measured"]["holds"] else "does not hold live"
            yield (
                f"{row['name']} {held}: {seen} at {number(row['measured']['rate'])}/s; its prediction is off by"
                f" {percent(row['off'])}, so it is not applied"
            )
    chosen = values["chosen"]
    if chosen is None:
        yield (
            "nothing held live as it was predicted: nothing to apply"
            if values["best"]
            else "no configuration held live"
        )
    elif chosen["name"] == "today" != values["best"]:
        yield f"{values['best']} is better live, and not applied: today's configuration stays"
    elif chosen["name"] == "today":
        yield "today's configuration is as good as the best that was confirmed: nothing to change"
    else:
        yield f"best: {chosen['name']}"
