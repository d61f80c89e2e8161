"""Figures of the proof page: Plotly charts drawn from an `optimize run` document.

Backgrounds stay transparent, and the page's style sheet colours texts and grid lines, so that one chart suits a light and
a dark page.
"""

from html import escape
from typing import Any

from plotly import graph_objects
from plotly.subplots import make_subplots

TRAINED, STEP, RESULT = "#8a94a0", "#4b8fd4", "#d9822b"
"""The trained model, what lies between, and what is published; readable on white and on black."""
PERCENTILES = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p999": "p99.9", "max": "max"}
Figure = Any


def journey(document: dict[str, Any]) -> str:
    """Return the chart of score (with its 95 % interval) above file size, from the trained model to the endpoint."""
    entries = [("trained", document["trained"]), *((step["name"], step) for step in document["steps"])]
    names, colours = [escape(name) for name, _ in entries], _colours(len(entries))
    scored = [entry["quality"] for _, entry in entries]
    sizes = [entry["cost"]["bytes"] for _, entry in entries]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=[0.55, 0.45])
    if document["endpoint"]:
        names, colours = [*names, "endpoint"], [*colours, RESULT]
        scored, sizes = [*scored, document["endpoint"]["quality"]], [*sizes, sizes[-1]]
    values = [quality["value"] for quality in scored]
    spread = {
        "array": [quality["high"] - quality["value"] for quality in scored],
        "arrayminus": [quality["value"] - quality["low"] for quality in scored],
        "symmetric": False,
        "color": STEP,
        "thickness": 1.5,
    }
    figure.add_scatter(
        x=names,
        y=values,
        error_y=spread,
        mode="lines+markers",
        line={"color": STEP, "width": 1, "dash": "dot"},
        marker={"color": colours, "size": 10},
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    scale, unit = _unit(max(sizes))
    figure.add_bar(
        x=names,
        y=[size / scale for size in sizes],
        marker={"color": colours},
        texttemplate=f"%{{y:.3s}} {unit}" if scale == 1 else f"%{{y:,.3~r}} {unit}",
        textposition="outside",
        cliponaxis=False,
        width=0.5,
        hovertemplate=f"%{{x}}: %{{y:,.1f}} {unit}<extra></extra>",
        row=2,
        col=1,
    )
    floor = _floor(document)
    if floor is not None:
        figure.add_hline(y=floor, line={"color": RESULT, "width": 1, "dash": "dash"}, row=1, col=1)
        label = {"text": "budget", "x": 1, "xref": "paper", "xanchor": "right", "y": floor, "yanchor": "bottom"}
        figure.add_annotation(**label, showarrow=False, row=1, col=1)
    figure.update_yaxes(title_text=escape(scored[0]["metric"]), row=1, col=1)
    figure.update_yaxes(title_text=f"ONNX file, {unit}", range=[0, max(sizes) / scale * 1.18], row=2, col=1)
    figure.update_xaxes(categoryorder="array", categoryarray=names)
    return _html(figure, "figure-journey", 430)


def latency(document: dict[str, Any]) -> str:
    """Return the chart of milliseconds for one call in ONNX Runtime: a panel for each batch size, a bar for each step."""
    entries = [("trained", document["trained"]), *((step["name"], step) for step in document["steps"])]
    batches = list(document["trained"]["cost"]["latency_ms"])
    columns = min(2, len(batches))
    rows = -(-len(batches) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[f"batch {escape(batch)}" for batch in batches],
    )
    for number, batch in enumerate(batches):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        times = [entry["cost"]["latency_ms"].get(batch) for _, entry in entries]
        figure.add_bar(
            y=[escape(name) for name, _ in entries],
            x=times,
            orientation="h",
            marker={"color": _colours(len(entries))},
            texttemplate="%{x:.3~r} ms",
            textposition="outside",
            cliponaxis=False,
            width=0.6,
            hovertemplate="%{y}: %{x:.4~r} ms<extra></extra>",
            **place,
        )
        figure.update_xaxes(range=[0, max(time or 0 for time in times) * 1.3], ticksuffix=" ms", nticks=5, **place)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _html(figure, "figure-latency", rows * (80 + 32 * len(entries)))


def load(report: dict[str, Any]) -> str:
    """Return the chart of the load test's percentiles: latency from the planned time, service from the sending."""
    figure = graph_objects.Figure()
    series = (("latency, from the planned time", "latency_ms", RESULT), ("service, from the sending", "service_ms", STEP))
    for name, key, colour in series:
        figure.add_scatter(
            x=list(PERCENTILES.values()),
            y=[report[key][percentile] for percentile in PERCENTILES],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": "solid" if key == "latency_ms" else "dot"},
            marker={"size": 8},
            hovertemplate="%{x}: %{y:.3~r} ms<extra></extra>",
        )
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.15, "x": 0})
    figure.update_yaxes(ticksuffix=" ms", rangemode="tozero")
    return _html(figure, "figure-load", 300)


def _html(figure: Figure, name: str, height: int) -> str:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        hoverlabel={"font": {"color": "#fff"}},
    )
    if not figure.layout.showlegend:
        figure.update_layout(showlegend=False)
    figure.update_xaxes(automargin=True, fixedrange=True, zeroline=False)
    figure.update_yaxes(automargin=True, fixedrange=True, zeroline=False)
    config = {"responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=name))


def _colours(count: int) -> list[str]:
    """Return one colour for each model of a run, the trained one first."""
    return [TRAINED, *[STEP] * (count - 2), RESULT][:count]


def _floor(document: dict[str, Any]) -> float | None:
    """Return the lowest score that the budget allows; None where the recipe leaves it to the default."""
    budget, trained = document["recipe"]["budget"], document["trained"]["quality"]["value"]
    if "max_drop" in budget:
        return float(trained - budget["max_drop"])
    return float(trained * budget["keep"]) if "keep" in budget else None


def _unit(size: int) -> tuple[int, str]:
    """Return the decimal unit in which `size` bytes are a handy number."""
    return next((unit for unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= 2 * unit[0]), (1, "bytes"))
