"""Page: what was tuned as one HTML file that opens without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.record.statistics import number
from serve.tuning import report

if TYPE_CHECKING:
    from loadtest.report.charts import Chart

KNOBS = {"threads": "Threads", "instances": "Instances", "max_batch": "Largest batch", "delay_us": "Delay in µs"}
PARTS = {
    "queue": "queue",
    "call": "call",
    "inside": "inside: server, at each call",
    "outside": "outside: server and client",
}
GROWING = 3.0
"""A bar is as wide as its table at so many times the limit, or the chosen value."""


def write(values: dict[str, Any], destination: Path) -> None:
    """Write the page of a tuning; an existing file is replaced at once or not at all.

    Args:
        values: its document.
        destination: the page; its folder is made.
    """
    import jinja2

    from loadtest.report.exports import replacing
    from loadtest.report.page import environment, plotly

    ours = environment()
    ours.loader = jinja2.ChoiceLoader([jinja2.PackageLoader("serve.tuning", "templates"), *filter(None, [ours.loader])])
    name, *_ = values["confirmed"][0]["measured"]["interval_ms"]
    shown = _shown(values)
    rate = shown["predicted"]["rate"]
    page = {
        "title": f"Tuning of {values['model']}",
        "headline": report.headline(values),
        "lines": list(report.lines(values)),
        "columns": report.COLUMNS,
        "rows": list(report.rows(values)),
        "name": name,
        "shown": shown["name"],
        "rate": rate,
        "knobs": [(KNOBS[knob], list(_bars(values, shown, knob, name))) for knob in KNOBS],
        "charts": [_over_rate(values, name), _spent(values)],
        "diff": values["diff"],
        **_verdict(values),
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    with replacing(destination) as file:
        file.write(ours.get_template("tune.html").render(plotly=plotly(), **page))


def _verdict(values: dict[str, Any]) -> dict[str, Any]:
    """Return what follows: a verdict, its tone and the lines before it."""
    *told, verdict = report.end(values)
    chosen = values["chosen"]
    tone = "bad" if chosen is None else "open" if chosen["name"] == "today" else "good"
    if chosen and chosen["name"] != "today":
        knobs = ", ".join(f"{heading.lower()} {chosen[knob]}" for knob, heading in KNOBS.items())
        verdict = f"{verdict}: {knobs}"
    return {"verdict": verdict, "told": told, "tone": tone}


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """Return the live run of the configuration whose knobs are shown."""
    name = values["spent"][-1]["name"]
    found: dict[str, Any] = next(row for row in values["confirmed"] if row["name"] == name)
    return found


def _bars(values: dict[str, Any], shown: dict[str, Any], knob: str, name: str) -> Iterator[dict[str, Any]]:
    """Yield a bar for each value of a knob."""
    now, limit = shown["predicted"][knob], values["limit_ms"]
    widest = GROWING * max(limit or 0.0, shown["predicted"]["latency_ms"][name])
    late = [one["latency_ms"][name] for one in values["knobs"][knob]]
    widest = min(widest, max(*late, limit or 0.0) * 1.05)
    for one, value in zip(values["knobs"][knob], late, strict=True):
        yield {
            "at": f"{one[knob]:,}",
            "now": one[knob] == now,
            "holds": one["holds"],
            "width": round(100 * min(1.0, value / widest), 1),
            "limit": None if limit is None else round(100 * limit / widest, 1),
            "text": f"{number(value)} ms",
        }


def _over_rate(values: dict[str, Any], name: str) -> "Chart":
    """Return latency over rate: lines as predicted, points as measured with their intervals."""
    import plotly.graph_objects as go

    from loadtest.report.charts import BLUE, GREY, ORANGE, TICKS, chart, line

    colors = dict(zip(values["rates"], (GREY, BLUE), strict=False))
    traces = []
    for run, found in values["rates"].items():
        rates, late = [one["rate"] for one in found], [one["latency_ms"][name] for one in found]
        trace = line(rates, late, f"{run}, predicted", colors[run])
        trace.hovertemplate = "%{y:.3g} ms"
        traces.append(trace)
    for row in values["confirmed"]:
        seen, (low, high) = row["measured"], row["measured"]["interval_ms"][name]
        value = seen["latency_ms"][name]
        error = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
        point = go.Scatter(x=[seen["rate"]], y=[value], name=f"{row['name']}, measured", mode="markers", error_y=error)
        point.marker = {
            "size": 9,
            "color": colors.get(row["name"], ORANGE),
            "symbol": "circle" if seen["holds"] else "x",
        }
        point.hovertemplate = "%{y:.3g} ms"
        traces.append(point)
    shapes = []
    if values["limit_ms"]:
        limit = {"y0": values["limit_ms"], "y1": values["limit_ms"], "x0": 0, "x1": 1, "xref": "paper"}
        shapes.append({"type": "line", "line": {"dash": "dot", "color": ORANGE, "width": 1.5}, **limit})
    return chart(
        f"Latency over rate, {name}",
        "Lines are simulated with what the live runs corrected, points are live runs with 95 % intervals; a cross does"
        " not hold the objective, the dotted line is its limit.",
        traces,
        height=400,
        showlegend=True,
        hovermode="closest",
        shapes=shapes,
        xaxis={"title": "requests per second", "rangemode": "tozero"},
        yaxis={"title": "milliseconds", "type": "log", "tickvals": TICKS, "ticktext": [f"{at:g}" for at in TICKS]},
    )


def _spent(values: dict[str, Any]) -> "Chart":
    """Return where the time of a request goes, predicted and measured."""
    import plotly.graph_objects as go

    from loadtest.report.charts import BLUE, GREY, LIGHT_BLUE, ORANGE, chart

    bars = [(f"{one['name']}, {kind}", one[kind]) for one in values["spent"] for kind in ("measured", "predicted")]
    traces = [
        go.Bar(
            y=[name for name, _ in bars],
            x=[parts.get(part) for _, parts in bars],
            name=text,
            orientation="h",
            marker={"color": color},
            hovertemplate="%{x:.3g} ms",
        )
        for (part, text), color in zip(PARTS.items(), (ORANGE, BLUE, LIGHT_BLUE, GREY), strict=True)
    ]
    return chart(
        "Where the time goes",
        "Of a request, on average. What the server adds to a call it counts as part of the call.",
        traces,
        height=110 + 38 * len(bars),
        barmode="stack",
        showlegend=True,
        hovermode="closest",
        xaxis={"title": "milliseconds"},
        yaxis={"automargin": True, "autorange": "reversed"},
    )
