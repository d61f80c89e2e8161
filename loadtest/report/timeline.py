"""Timeline: the phases of a scenario one after another, as charts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from loadtest.record.results import MISMATCH, OK, TIMEOUT, Results
from loadtest.record.statistics import percentile, windows
from loadtest.report.charts import (
    BLUE,
    FEWEST_PER_WINDOW,
    GREEN,
    GREY,
    MOST_WINDOWS,
    ORANGE,
    RED,
    TICKS,
    Chart,
    chart,
    line,
)

_TONES = {"good": GREEN, "bad": RED, "open": GREY}


class Phase(NamedTuple):
    """A phase of a scenario: its name, its run, and `good`, `bad` or `open` for what became of it."""

    name: str
    run: Results
    tone: str


def timeline(phases: Sequence[Phase]) -> list[Chart]:
    """Return latency and throughput over all phases of a scenario, one after another, each shaded by its outcome."""
    ends = np.cumsum([phase.run.header["plan"]["duration"] for phase in phases])
    starts = [0.0, *ends[:-1].tolist()]
    shades = [
        {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": start, "x1": end, "line": {"width": 0}}
        | {"fillcolor": _TONES[phase.tone], "opacity": 0.16, "layer": "below"}
        for phase, start, end in zip(phases, starts, ends.tolist(), strict=True)
    ]
    numbers = [
        {"x": (shade["x0"] + shade["x1"]) / 2, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        | {"text": str(number), "hovertext": phase.name}
        for number, (shade, phase) in enumerate(zip(shades, phases, strict=True), 1)
    ]
    series: dict[str, list[float]] = {"at": [], "p50": [], "p99": [], "rate": [], "due": []}
    for phase, start in zip(phases, starts, strict=True):
        _add_phase(series, phase.run, start)
    shared: dict[str, Any] = {
        "shapes": shades,
        "annotations": numbers,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        "margin": {"l": 66, "r": 18, "t": 30, "b": 84},
        "xaxis": {"title": "seconds since the start", "range": [0, float(ends[-1])]},
    }
    at = series["at"]
    ticks = {"type": "log", "tickvals": TICKS, "ticktext": [f"{tick:g}" for tick in TICKS]}
    return [
        chart(
            "Latency over the phases",
            "By the time that requests were due.",
            [line(at, series[key], key, color) for key, color in (("p99", ORANGE), ("p50", BLUE))],
            **shared,
            yaxis={"title": "milliseconds", **ticks},
        ),
        chart(
            "Throughput over the phases",
            "Requests that were due, and those that were answered.",
            [line(at, series["due"], "due", GREY, dash="dot"), line(at, series["rate"], "answered", BLUE)],
            **shared,
            yaxis={"title": "requests per second"},
        ),
    ]


def _add_phase(series: dict[str, list[float]], run: Results, start: float) -> None:
    """Add the windows of one phase to the series of all."""
    counted = run.of(OK, MISMATCH, TIMEOUT)
    duration = float(run.header["plan"]["duration"])
    edges = windows(duration, max(1, min(MOST_WINDOWS // 4, int(counted.sum()) // FEWEST_PER_WINDOW)))
    latency, place = (run.done - run.planned) * 1e3, np.digitize(run.planned, edges) - 1
    due = np.histogram(run.planned, edges)[0] / np.diff(edges)
    answered = np.histogram(run.done[run.of(OK, MISMATCH)], edges)[0] / np.diff(edges)
    for window in range(len(edges) - 1):
        inside = latency[counted & (place == window)]
        series["at"].append(start + float(edges[window] + edges[window + 1]) / 2)
        series["p50"].append(percentile(inside, 50))
        series["p99"].append(percentile(inside, 99))
        series["due"].append(float(due[window]))
        series["rate"].append(float(answered[window]))
