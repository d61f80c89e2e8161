"""Report: a plan for the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loadtest.record.statistics import number

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = ("", "replicas", "rate/s", "p50 ms", "p99 ms", "load", "holds", "needs")
"""`load` is the rate over what the replicas answer at the most, `needs` the number that holds all the same."""


def text(values: dict[str, Any]) -> "RenderableType":
    """Return the plan as it is printed, at 80 columns and more."""
    from rich.console import Group
    from rich.text import Text

    from loadtest.record.table import table

    shown = table(*COLUMNS, figures=slice(1, 6))
    for row in rows(values):
        shown.add_row(*row)
    told = [Text(line) for line in lines(values)]
    notes = [Text(f"note: {note}", "yellow") for note in values["notes"]]
    return Group(Text(headline(values), "bold"), *told, Text(), shown, *([Text(), *notes] if notes else []))


def headline(values: dict[str, Any]) -> str:
    """Return the plan in a line."""
    smallest, replicas = values["smallest"]["replicas"], values["replicas"]
    holds = "holds" if smallest == 1 else "hold"
    spare = f": {smallest:,} {holds} it, {replicas - smallest:,} to spare" if replicas > smallest else ""
    return f"{values['model']}: {replicas:,} replicas for {values['rate']:,.10g}/s{spare}"


def rows(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield what the plan and each case do, in `COLUMNS`."""
    smallest, planned = values["smallest"], values["planned"]
    yield "smallest", *_cells(smallest), ""
    if planned["replicas"] != smallest["replicas"]:
        yield "planned", *_cells(planned), ""
    for case in values["cases"]:
        yield case["text"], *_cells(case), "-" if case["needed"] is None else f"{case['needed']:,}"


def lines(values: dict[str, Any]) -> Iterator[str]:
    """Yield what follows from the plan, a line for each thing."""
    head = values["planned"]["headroom"]
    yield f"holds: {values['objective']}; {values['arrival']} arrivals, {values['balance']} balancing"
    yield f"headroom: {head['ratio']:.2f} times the rate, up to {number(head['rate'])}/s"
    for one in values["planned"]["conditions"]:
        unit = "%" if one["unit"] == "%" else f" {one['unit']}"
        if one["low"] == one["low"]:
            between = f"95 % from {number(one['low'])} to {number(one['high'])}"
            yield f"{one['text']}: {number(one['measured'])}{unit}, {between}"
    yield f"breaks first: {values['binding']}"
    if (held := values["per_pod_rate"]) is not None:
        yield f"autoscaling: {number(held)}/s per replica; the knee is {number(values['knee'])}/s"
        yield f"a new replica helps after {values['reacts_seconds']:.0f} s"
    for case in values["cases"]:
        if case["case"] == "update" and case["seconds"]:
            yield f"{case['text']}: {case['seconds']:,.0f} s"
    if cost := values["cost"]:
        yield (
            f"cost: {number(cost['per_million'])} for a million requests, {number(cost['per_hour'])} an hour:"
            f" {cost['machines']:,} × {cost['machine']} at {cost['price']:g}"
        )


def _cells(outcome: dict[str, Any]) -> tuple[str, ...]:
    times = outcome["latency_ms"]
    figures = (number(times["p50"]), number(times["p99"]), f"{outcome['load']:.0%}")
    return (f"{outcome['replicas']:,}", f"{outcome['rate']:,.0f}", *figures, "yes" if outcome["holds"] else "NO")
