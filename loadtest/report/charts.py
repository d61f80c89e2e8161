"""Charts: the pictures of a run, as HTML that needs Plotly's script beside it.

Colours of text and lines come from the page's style sheet, so that they follow a dark scheme and paper. A picture never
draws every request: it draws windows of time with the largest value in each, and percentiles up to the largest.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loadtest.judge import breakdown
from loadtest.judge.summary import corrected
from loadtest.record.results import MISMATCH, OK, TIMEOUT, Results
from loadtest.record.statistics import curve, number, percentile, windows

BLUE, ORANGE, GREEN, RED, GREY = "#3b82f6", "#d97706", "#0d9488", "#dc2626", "#94a3b8"
PURPLE, PALE_BLUE, LIGHT_BLUE, PALE = "#8b5cf6", "#93c5fd", "#60a5fa", "#cbd5e1"
_STAGES = {
    "queue": ("queue", ORANGE),
    "compute_input": ("compute: input", PALE_BLUE),
    "compute_infer": ("compute: model", BLUE),
    "compute_output": ("compute: output", LIGHT_BLUE),
    "other": ("server: other", PALE),
    "network": ("network and client", GREY),
}
MOST_WINDOWS = 60
FEWEST_PER_WINDOW = 20
_MOST_KINDS = 6
_LEGEND_ABOVE = {"orientation": "h", "x": 0, "y": 1.05, "yanchor": "bottom", "traceorder": "normal"}
# Plotly's own ticks between the powers of ten show their first digit only.
TICKS = [step * 10.0**exponent for exponent in range(-3, 6) for step in (1, 2, 5)]
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"

Chart = dict[str, str]


def charts(results: Results, values: dict[str, Any]) -> list[Chart]:
    """Return the pictures of one run that its figures allow.

    Args:
        results: the run.
        values: its document.
    """
    drawn: list[Chart | None] = []
    if results.of(OK, MISMATCH, TIMEOUT).any():
        drawn += [_percentiles(results), _latency_over_time(results), _throughput(results, values)]
        drawn += [_errors(results), _split(values), _split_over_time(results), _batches(values)]
    else:
        drawn.append(_errors(results))
    drawn += [_processor(results), _memory(results)]
    return [chart for chart in drawn if chart]


def chart(title: str, caption: str, traces: list[Any], height: int = 340, **layout: Any) -> Chart:
    """Return a chart for the template: title, caption and the drawing as HTML."""
    import plotly.graph_objects as go

    figure = go.Figure(traces)
    axis = {
        "automargin": True,
        "fixedrange": True,
        "gridcolor": "#e2e8f0",
        "zeroline": False,
        "linecolor": "#94a3b8",
        "ticks": "outside",
        "tickcolor": "#94a3b8",
    }
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 66, "r": 18, "t": 34, "b": 52},
        font={"family": _FONT, "size": 12, "color": "#334155"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis, rangemode="tozero")
    figure.update_layout(**layout)
    drawing = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
    )
    return {"title": title, "caption": caption, "drawing": drawing}


def line(x: Any, y: Any, name: str, color: str, **more: Any) -> Any:
    """Return a line of a chart."""
    import plotly.graph_objects as go

    # A line through one point would not be seen.
    mode = "lines" if len(x) > 5 else "lines+markers"
    return go.Scatter(x=x, y=y, name=name, mode=mode, line={"color": color, "width": 2, **more})


def _seconds(results: Results) -> dict[str, Any]:
    """Return the time axis; one range for all charts, so that they can be read below each other."""
    moments = (results.planned, results.done[~np.isnan(results.done)], breakdown.column(results, "reading")[0])
    end = max(float(values.max()) for values in moments if len(values))
    return {"title": "seconds since the start", "range": [0, end]}


def _percentiles(results: Results) -> Chart:
    counted = results.of(OK, MISMATCH, TIMEOUT)
    latency = (results.done - results.planned)[counted]
    service = (results.done - results.sent)[counted & ~np.isnan(results.sent)]
    lines = [(service, "service, from the sending", GREY)]
    if results.open:
        lines.append((latency, "latency, from the planned time", BLUE))
    else:
        lines.append((corrected(results), "corrected: as if requests had been due", BLUE))
    traces = []
    for values, name, color in lines:
        percents, seconds = curve(values)
        trace = line(-np.log10(1 - percents / 100), seconds * 1e3, name, color)
        trace.customdata, trace.hovertemplate = percents, "%{y:.3g} ms at %{customdata:.3f} %"
        traces.append(trace)
    nines = int(np.ceil(np.log10(max(len(latency), 10))))
    ticks = [0.0, 50.0, *(100 * (1 - 10.0**-n) for n in range(1, nines + 1))]
    axis = {
        "title": "percentile of requests (%)",
        "tickvals": [-np.log10(1 - tick / 100) for tick in ticks],
        "ticktext": [f"{tick:.10g}" for tick in ticks],
        "tickangle": 0,
        "tickfont": {"size": 11},
        "unifiedhovertitle": {"text": ""},
    }
    return chart(
        "Latency by percentile",
        "How long the slowest part of the requests took: at 99 %, one in a hundred took longer.",
        traces,
        showlegend=True,
        xaxis=axis,
        yaxis={"title": "milliseconds"},
    )


def _latency_over_time(results: Results) -> Chart:
    counted = results.of(OK, MISMATCH, TIMEOUT)
    planned, latency = results.planned[counted], (results.done - results.planned)[counted] * 1e3
    edges = windows(float(planned.max()) + 1e-6, min(MOST_WINDOWS, len(planned) // FEWEST_PER_WINDOW))
    parts = [part for part in np.split(latency, np.searchsorted(planned, edges[1:-1]))]
    middles = (edges[:-1] + edges[1:]) / 2
    rows = (("largest", 100.0, GREY), ("p99", 99.0, ORANGE), ("p50", 50.0, BLUE))
    return chart(
        "Latency over time",
        f"By the time that requests were due, in windows of {edges[1] - edges[0]:.3g} s.",
        [line(middles, [percentile(part, percent) for part in parts], name, color) for name, percent, color in rows],
        xaxis=_seconds(results),
        yaxis={"title": "milliseconds", "type": "log", "tickvals": TICKS, "ticktext": [f"{at:g}" for at in TICKS]},
    )


def _throughput(results: Results, values: dict[str, Any]) -> Chart:
    done = results.done[~np.isnan(results.done)]
    edges = windows(float(done.max()) + 1e-6, min(MOST_WINDOWS, len(done) // FEWEST_PER_WINDOW))
    middles, seconds = (edges[:-1] + edges[1:]) / 2, np.diff(edges)

    def per_second(moments: Any) -> Any:
        return np.histogram(moments, edges)[0] / seconds

    traces = [line(middles, per_second(results.done[results.of(OK, MISMATCH)]), "answered", BLUE)]
    if results.open:
        traces.insert(0, line(middles, per_second(results.planned), "due", GREY, dash="dot"))
    if values["requests"]["failed"]:
        failed = ~results.of(OK, MISMATCH) & ~np.isnan(results.done)
        traces.append(line(middles, per_second(results.done[failed]), "failed", RED))
    return chart(
        "Throughput over time",
        f"In windows of {edges[1] - edges[0]:.3g} s.",
        traces,
        xaxis=_seconds(results),
        yaxis={"title": "requests per second"},
        showlegend=True,
    )


def _split(values: dict[str, Any]) -> Chart | None:
    import plotly.graph_objects as go

    server = values["server"]
    if not server or "request_ms" not in server:
        return None
    spent = {stage: server[f"{stage}_ms"] for stage in breakdown.STAGES}
    spent["other"] = max(server["request_ms"] - sum(spent.values()), 0.0)
    spent["network"] = max(server["service_ms"] - server["request_ms"], 0.0)
    inside = [(_STAGES[stage][0], milliseconds, _STAGES[stage][1]) for stage, milliseconds in spent.items()]
    traces = [
        go.Bar(
            y=["mean request"],
            x=[milliseconds],
            name=f"{name}, {number(milliseconds)} ms",
            orientation="h",
            marker={"color": color},
            hovertemplate="%{x:.3g} ms",
        )
        for name, milliseconds, color in inside
    ]
    return chart(
        "Where the time goes",
        "The mean service time, split by what the server itself measured; the rest lies outside of the server.",
        traces,
        height=300,
        barmode="stack",
        hovermode="closest",
        xaxis={"title": "milliseconds"},
        yaxis={"visible": False},
        # On a phone its names need six lines.
        legend={"orientation": "h", "x": 0, "y": -0.6, "yanchor": "top", "traceorder": "normal"},
        margin={"l": 18, "r": 18, "t": 8, "b": 170},
    )


def _area(x: Any, y: Any, name: str, color: str) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(x=x, y=y, name=name, mode="lines", stackgroup="all", line={"color": color, "width": 0.5})


def _split_over_time(results: Results) -> Chart | None:
    spent = breakdown.stages(results)
    if spent is None:
        return None
    at = spent.pop("at")
    return chart(
        "Where the time goes, over the run",
        "The mean request between two readings of the server's metrics, about a second apart.",
        [_area(at, np.nan_to_num(spent[stage]), *_STAGES[stage]) for stage in spent],
        xaxis=_seconds(results),
        yaxis={"title": "milliseconds"},
        showlegend=True,
        legend=_LEGEND_ABOVE,
        margin={"l": 66, "r": 18, "t": 64, "b": 52},
    )


def _batches(values: dict[str, Any]) -> Chart | None:
    import plotly.graph_objects as go

    found = {int(size): count for size, count in ((values["server"] or {}).get("batches") or {}).items()}
    if not found:
        return None
    sizes, counts = sorted(found), [found[size] for size in sorted(found)]
    samples = [size * count for size, count in zip(sizes, counts, strict=True)]
    bars = [
        go.Bar(
            x=sizes,
            y=[100 * part / sum(parts) for part in parts],
            name=name,
            marker={"color": color},
            customdata=parts,
            hovertemplate="%{customdata:,}, %{y:.1f} %",
        )
        for parts, name, color in ((counts, "runs of the model", GREY), (samples, "samples", BLUE))
    ]
    return chart(
        "Batches really formed",
        "How many samples the server ran together, by its own count over the run.",
        bars,
        height=300,
        showlegend=True,
        bargap=0.3,
        xaxis={"title": "samples in a batch", "type": "category" if len(sizes) < 20 else "linear"},
        yaxis={"title": "percent"},
    )


def _errors(results: Results) -> Chart | None:
    import plotly.graph_objects as go

    found = breakdown.failures(results)
    if not found:
        return None
    most, rest = found[: _MOST_KINDS - 1], [moments for _, moments in found[_MOST_KINDS - 1 :]]
    if rest:
        most.append(("others", np.concatenate(rest)))
    last = max(float(moments.max()) for _, moments in found)
    edges = windows(last + 1e-6, MOST_WINDOWS)
    middles, colors = (edges[:-1] + edges[1:]) / 2, (RED, ORANGE, PURPLE, BLUE, LIGHT_BLUE, GREY)
    bars = [
        go.Bar(x=middles, y=np.histogram(moments, edges)[0], name=name, marker={"color": color}, width=np.diff(edges))
        for (name, moments), color in zip(most, colors, strict=False)
    ]
    return chart(
        "Failures over time",
        f"By what went wrong, in windows of {edges[1] - edges[0]:.3g} s.",
        bars,
        height=300,
        barmode="stack",
        showlegend=True,
        xaxis=_seconds(results),
        yaxis={"title": "requests"},
    )


def _processor(results: Results) -> Chart | None:
    # Shares of a whole are drawn as percent, so that machine and GPU stand on one axis with the server's cores.
    rows = (
        ("server_cpu", "server, of one core", 100, BLUE),
        ("machine_cpu", "whole machine", 100, GREY),
        ("gpu", "GPU", 100, GREEN),
    )
    caption = "Read about once a second; 200 % are two cores."
    return _readings(results, "Processor of the server's machine", caption, rows, "percent")


def _memory(results: Results) -> Chart | None:
    # Beside the whole machine's, the growth of the server's memory would not be seen.
    own = any("server_memory" in row for row in results.readings)
    first = ("server_memory", "server's processes") if own else ("machine_memory", "used on the whole machine")
    rows = ((*first, 2**-20, BLUE), ("gpu_memory", "GPU", 2**-20, GREEN))
    caption = "Read about once a second; pages that several processes share count once for each."
    return _readings(results, "Memory of the server's machine", caption, rows, "MiB")


def _readings(
    results: Results, title: str, caption: str, rows: Sequence[tuple[str, str, float, str]], unit: str
) -> Chart | None:
    """Return the chart of a reading's keys, each with its name, its factor and its color; None if there are none."""
    drawn = []
    for key, name, factor, color in rows:
        at, read = breakdown.column(results, key)
        if len(at):
            drawn.append(line(at, read * factor, name, color))
    if not drawn:
        return None
    axes = {"xaxis": _seconds(results), "yaxis": {"title": unit}}
    return chart(title, caption, drawn, height=260, showlegend=True, **axes)


def against_rate(runs: Sequence[tuple[str, dict[str, Any]]]) -> Chart:
    """Return latency over throughput: one point for each run, by the rate that was achieved.

    Args:
        runs: a name and the document of each.
    """
    ordered = sorted(runs, key=lambda run: run[1]["rate"]["achieved"])
    rates = [values["rate"]["achieved"] for _, values in ordered]
    traces = []
    for key, color in (("p99", ORANGE), ("p50", BLUE)):
        trace = line(rates, [values["latency_ms"][key] for _, values in ordered], key, color)
        trace.mode = "lines+markers"
        trace.marker = {"size": 9, "symbol": ["circle" if values["valid"] else "x" for _, values in ordered]}
        trace.customdata = [name for name, _ in ordered]
        trace.hovertemplate = "%{y:.3g} ms, %{customdata}"
        traces.append(trace)
    return chart(
        "Latency over throughput",
        "Each point is a run, at the rate that it achieved; a cross marks one that is invalid.",
        traces,
        showlegend=True,
        xaxis={"title": "requests answered per second", "rangemode": "tozero"},
        yaxis={"title": "milliseconds", "type": "log", "tickvals": TICKS, "ticktext": [f"{at:g}" for at in TICKS]},
    )
