"""Figures of the proof page: Plotly charts drawn from an `optimize run` document.

Backgrounds stay transparent, and the page's style sheet colours texts and grid lines, so that one chart suits a light
and a dark page.
"""

from html import escape
from typing import Any

from plotly import graph_objects
from plotly.subplots import make_subplots

from loadtest.record.statistics import number
from loadtest.report.terminal import latencies
from optimize.judge.gate import DEFAULT_KEEP
from optimize.report import table

TRAINED, STEP, RESULT = "#94a3b8", "#3b82f6", "#d97706"
"""The trained model, what lies between, and what is published; readable on white and on black."""
PERCENTILES = {"p50": "p50", "p90": "p90", "p95": "p95", "p99": "p99", "p999": "p99.9", "max": "max"}
ROW, HEAD = 34, 70
"""Pixels for one model, and for the titles and ticks around all."""
Figure = Any


def journey(document: dict[str, Any]) -> str:
    """Return the chart of score, with its 95 % interval, and file size, from the trained model to the endpoint."""
    entries = _models(document)
    names, colours = [escape(name) for name, _ in entries], _colours(len(entries))
    scores = [entry["quality"] for _, entry in entries]
    sizes = [entry["cost"]["bytes"] for _, entry in entries]
    if document["endpoint"]:
        # The endpoint serves the last file.
        names, colours = [*names, "endpoint"], [*colours, RESULT]
        scores, sizes = [*scores, document["endpoint"]["quality"]], [*sizes, sizes[-1]]
    scale, unit = _unit(max(sizes))
    figure = panels([f"{escape(table.metric(scores[0]))}, 95 % interval", f"ONNX file, {unit}"], columns=2)
    # One trace for each model, because error bars take only one colour.
    for name, colour, score in zip(names, colours, scores, strict=True):
        figure.add_scatter(
            x=[score["value"]],
            y=[name],
            error_x={
                "array": [score["high"] - score["value"]],
                "arrayminus": [score["value"] - score["low"]],
                "color": colour,
            },
            mode="markers",
            marker={"color": colour, "size": 11},
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            row=1,
            col=1,
        )
    bars(figure, names, [size / scale for size in sizes], colours, unit, row=1, col=2)
    low, high = min(score["low"] for score in scores), max(score["high"] for score in scores)
    figure.update_xaxes(range=[low - (high - low) * 0.1, high + (high - low) * 0.1], row=1, col=1)
    figure.add_vline(x=_limit(document), line={"color": RESULT, "width": 1.5, "dash": "dot"}, row=1, col=1)
    return html(figure, "figure-journey", HEAD + ROW * len(names))


def latency(document: dict[str, Any]) -> str:
    """Return the chart of milliseconds for one call in ONNX Runtime: a panel for a batch size, a bar for a step."""
    entries = _models(document)
    names, colours = [escape(name) for name, _ in entries], _colours(len(entries))
    batches = list(document["trained"]["cost"]["latency_ms"])
    columns = min(2, len(batches))
    figure = panels([f"batch {escape(batch)}, ms" for batch in batches], columns)
    for index, batch in enumerate(batches):
        times = [entry["cost"]["latency_ms"].get(batch, 0.0) for _, entry in entries]
        bars(figure, names, times, colours, "ms", row=index // columns + 1, col=index % columns + 1)
    return html(figure, "figure-latency", -(-len(batches) // columns) * (HEAD + ROW * len(names)))


def load(report: dict[str, Any]) -> str:
    """Return the chart of the load test's percentiles: service, and latency, of a closed loop the corrected one."""
    figure, rows = graph_objects.Figure(), dict(latencies(report))
    lines = (("corrected" if "corrected" in rows else "latency", RESULT, "solid"), ("service", STEP, "dot"))
    for name, colour, dash in lines:
        figure.add_scatter(
            x=list(PERCENTILES.values()),
            y=[rows[name][percentile] for percentile in PERCENTILES],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
            marker={"size": 8},
            cliponaxis=False,
            hovertemplate=f"{name} %{{x}}: %{{y:.3~r}} ms<extra></extra>",
        )
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_yaxes(title_text="ms", rangemode="tozero", nticks=6)
    return html(figure, "figure-load", 300)


def panels(titles: list[str], columns: int) -> Figure:
    """Return panels side by side whose rows are the models, the trained one at the top, named once at the left."""
    rows = -(-len(titles) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=0.3 / rows,
        subplot_titles=titles,
    )
    figure.update_annotations(font_size=12)
    # Invisible ticks keep the names off the bars.
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="outside", ticklen=6, tickcolor="rgba(0,0,0,0)")
    figure.update_xaxes(nticks=5)
    return figure


def _models(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the trained model and the steps under names that differ; a recipe may use one method twice."""
    steps = [(f"{number} {step['name']}", step) for number, step in enumerate(document["steps"], 1)]
    return [("trained", document["trained"]), *steps]


def bars(figure: Figure, names: list[str], values: list[float], colours: list[str], unit: str, **place: int) -> None:
    """Draw one bar for each model into the panel at `place` (row, col), with its value behind it."""
    figure.add_bar(
        x=values,
        y=names,
        orientation="h",
        marker={"color": colours},
        text=[number(value) for value in values],
        textposition="outside",
        cliponaxis=False,
        width=0.55,
        hovertemplate=f"%{{y}}: %{{text}} {unit}<extra></extra>",
        **place,
    )
    # Room for the text behind the longest bar.
    figure.update_xaxes(range=[0, max(values) * 1.25], **place)


def html(figure: Figure, name: str, height: int) -> str:
    """Return a figure in the pages' style as the HTML element `name` of so many pixels."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
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
    return [TRAINED, *[STEP] * (count - 2), RESULT]


def _limit(document: dict[str, Any]) -> float:
    """Return the worst score that the budget allows."""
    budget, trained = document["recipe"]["budget"], document["trained"]["quality"]
    if "max_drop" in budget:
        drop = budget["max_drop"] if trained["higher_is_better"] else -budget["max_drop"]
        return float(trained["value"] - drop)
    return float(trained["value"] * budget.get("keep", DEFAULT_KEEP))


def _unit(size: int) -> tuple[int, str]:
    """Return the decimal unit in which `size` bytes are a handy number."""
    return next((unit for unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= 2 * unit[0]), (1, "bytes"))
