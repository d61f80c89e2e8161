"""Page: the report as one HTML file that opens without a network."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.report import MISMATCH_COLUMNS, facts, headline, mismatch_rows, number, plan_line, summary
from loadtest.results import MISMATCH, OK, TIMEOUT, Results, read
from loadtest.statistics import curve, percentile, windows

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#0d9488", "#dc2626", "#94a3b8"
_MOST_WINDOWS = 60
_FEWEST_PER_WINDOW = 20
_FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"


def write(results: Path, destination: Path) -> None:
    """Write the page of a result file; an existing file is replaced at once or not at all.

    Raises:
        BadInput: `results` is not a result file.
    """
    loaded = read(results)
    html = _render(loaded, summary(loaded))
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=destination.parent, prefix=f".{destination.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(html)
            file.flush()
            temporary.chmod(0o644)
            temporary.replace(destination)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _render(results: Results, values: dict[str, Any]) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.PackageLoader("loadtest", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html").render(
        values=values,
        headline=headline(values),
        plan_line=plan_line(values),
        facts=facts(values),
        mismatches=(MISMATCH_COLUMNS, mismatch_rows(values)),
        plan=_plan(values["plan"]),
        number=number,
        started=results.header.get("clock_start", ""),
        versions=results.header.get("versions", {}),
        charts=[chart for chart in _charts(results, values) if chart],
        plotly=get_plotlyjs(),
    )


def _plan(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what of the plan applies, with units."""
    units = {"duration": " s", "timeout": " s", "warmup": " s", "think": " s", "rate": " requests/s"}
    only_open = {"arrival", "profile", "seed", "in_flight", "speed"}
    return [
        (name.replace("in_flight", "most in flight"), f"{value}{units.get(name, '')}")
        for name, value in plan.items()
        if value not in (None, "") and (plan["concurrency"] is None or name not in only_open)
    ]


def _charts(results: Results, values: dict[str, Any]) -> list[dict[str, str] | None]:
    if not results.of(OK, MISMATCH, TIMEOUT).any():
        return []
    return [_percentiles(results), _latency_over_time(results), _throughput(results, values), _split(values)]


def _chart(title: str, caption: str, traces: list[Any], height: int = 340, **layout: Any) -> dict[str, str]:
    """Return a chart for the template: title, caption and the drawing as HTML."""
    import plotly.graph_objects as go

    figure = go.Figure(traces)
    axis = {
        "gridcolor": "#e5e7eb",
        "zeroline": False,
        "linecolor": "#94a3b8",
        "ticks": "outside",
        "tickcolor": "#94a3b8",
    }
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 66, "r": 18, "t": 34, "b": 52},
        font={"family": _FONT, "size": 13, "color": "#334155"},
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


def _line(x: Any, y: Any, name: str, color: str, **more: Any) -> Any:
    import plotly.graph_objects as go

    # A line through one point would not be seen.
    mode = "lines" if len(x) > 5 else "lines+markers"
    return go.Scatter(x=x, y=y, name=name, mode=mode, line={"color": color, "width": 2, **more})


def _seconds(results: Results) -> dict[str, Any]:
    """Return the time axis; one range for all charts, so that they can be read below each other."""
    return {"title": "seconds since the start", "range": [0, float(np.nanmax(results.done))]}


def _percentiles(results: Results) -> dict[str, str]:
    counted = results.of(OK, MISMATCH, TIMEOUT)
    latency = (results.done - results.planned)[counted]
    service = (results.done - results.sent)[counted & ~np.isnan(results.sent)]
    lines = [(latency, "latency, from the planned time", BLUE)]
    if results.open:
        lines.insert(0, (service, "service, from the sending", GREY))
    traces = []
    for values, name, color in lines:
        percents, seconds = curve(values)
        line = _line(-np.log10(1 - percents / 100), seconds * 1e3, name, color)
        line.customdata, line.hovertemplate = percents, "%{y:.3g} ms at %{customdata:.3f} %"
        traces.append(line)
    nines = int(np.ceil(np.log10(max(len(latency), 10))))
    ticks = [0.0, 50.0, *(100 * (1 - 10.0**-n) for n in range(1, nines + 1))]
    axis = {
        "title": "percentile of requests",
        "tickvals": [-np.log10(1 - tick / 100) for tick in ticks],
        "ticktext": [f"{tick:.10g} %" for tick in ticks],
        "unifiedhovertitle": {"text": ""},
    }
    return _chart(
        "Latency by percentile",
        "How long the slowest part of the requests took: at 99 %, one in a hundred took longer.",
        traces,
        showlegend=True,
        xaxis=axis,
        yaxis={"title": "milliseconds"},
    )


def _latency_over_time(results: Results) -> dict[str, str]:
    counted = results.of(OK, MISMATCH, TIMEOUT)
    planned, latency = results.planned[counted], (results.done - results.planned)[counted] * 1e3
    edges = windows(float(planned.max()) + 1e-6, min(_MOST_WINDOWS, len(planned) // _FEWEST_PER_WINDOW))
    parts = [part for part in np.split(latency, np.searchsorted(planned, edges[1:-1]))]
    middles = (edges[:-1] + edges[1:]) / 2
    # Plotly's own ticks between the powers of ten show their first digit only.
    ticks = [step * 10.0**exponent for exponent in range(-3, 6) for step in (1, 2, 5)]
    rows = (("largest", 100.0, GREY), ("p99", 99.0, ORANGE), ("p50", 50.0, BLUE))
    return _chart(
        "Latency over time",
        f"By the time that requests were due, in windows of {number((edges[1] - edges[0]) * 1e3)} ms.",
        [_line(middles, [percentile(part, percent) for part in parts], name, color) for name, percent, color in rows],
        xaxis=_seconds(results),
        yaxis={"title": "milliseconds", "type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]},
    )


def _throughput(results: Results, values: dict[str, Any]) -> dict[str, str]:
    done = results.done[~np.isnan(results.done)]
    edges = windows(float(done.max()) + 1e-6, min(_MOST_WINDOWS, len(done) // _FEWEST_PER_WINDOW))
    middles, seconds = (edges[:-1] + edges[1:]) / 2, np.diff(edges)

    def per_second(moments: Any) -> Any:
        return np.histogram(moments, edges)[0] / seconds

    traces = [_line(middles, per_second(results.done[results.of(OK, MISMATCH)]), "answered", GREEN)]
    if results.open:
        traces.insert(0, _line(middles, per_second(results.planned), "due", GREY, dash="dot"))
    if values["requests"]["failed"]:
        failed = ~results.of(OK, MISMATCH) & ~np.isnan(results.done)
        traces.append(_line(middles, per_second(results.done[failed]), "failed", RED))
    return _chart(
        "Throughput over time",
        f"In windows of {number((edges[1] - edges[0]) * 1e3)} ms.",
        traces,
        xaxis=_seconds(results),
        yaxis={"title": "requests per second"},
        showlegend=True,
    )


def _split(values: dict[str, Any]) -> dict[str, str] | None:
    import plotly.graph_objects as go

    server = values["server"]
    if not server or "request_ms" not in server:
        return None
    inside = [("queue", server["queue_ms"], ORANGE), ("compute: input", server["compute_input_ms"], "#93c5fd")]
    inside += [("compute: model", server["compute_infer_ms"], BLUE)]
    inside += [("compute: output", server["compute_output_ms"], "#60a5fa")]
    other = server["request_ms"] - server["queue_ms"] - server["compute_ms"]
    inside += [("server: other", max(other, 0.0), "#cbd5e1")]
    inside += [("network and client", max(server["service_ms"] - server["request_ms"], 0.0), GREY)]
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
    return _chart(
        "Where the time goes",
        "The mean service time, split by what the server itself measured; the rest lies outside of the server.",
        traces,
        height=230,
        barmode="stack",
        hovermode="closest",
        xaxis={"title": "milliseconds"},
        yaxis={"visible": False},
        legend={"orientation": "h", "x": 0, "y": 1.1, "yanchor": "bottom", "traceorder": "normal"},
        margin={"l": 18, "r": 18, "t": 90, "b": 52},
    )
