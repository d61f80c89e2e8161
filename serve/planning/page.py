"""Page: a plan as one HTML file that opens without a network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.planning import report

if TYPE_CHECKING:
    from loadtest.report.charts import Chart


def write(values: dict[str, Any], destination: Path) -> None:
    """Write the page of a plan; an existing file is replaced at once or not at all.

    Args:
        values: the plan's document.
        destination: the page.
    """
    import jinja2

    from loadtest.report.exports import replacing
    from loadtest.report.page import environment, plotly

    ours = environment()
    ours.loader = jinja2.ChoiceLoader(
        [jinja2.PackageLoader("serve.planning", "templates"), *filter(None, [ours.loader])]
    )
    shown = {
        "title": f"Plan for {values['model']}",
        "headline": report.headline(values),
        "lines": list(report.lines(values)),
        "columns": report.COLUMNS,
        "rows": list(report.rows(values)),
        "notes": values["notes"],
        "charts": [_over_rate(values), _over_replicas(values)],
    }
    with replacing(destination) as file:
        file.write(ours.get_template("plan.html").render(plotly=plotly(), **shown))


def _over_rate(values: dict[str, Any]) -> "Chart":
    caption = f"Of {values['replicas']:,} replicas, simulated; up to the rate at which the objective breaks."
    return _chart("Latency over rate", caption, values["curve"], ("rate", "requests per second"))


def _over_replicas(values: dict[str, Any]) -> "Chart":
    caption = f"At {values['rate']:,.10g} requests per second, simulated; a cross does not hold the objective."
    return _chart("Latency over replicas", caption, values["tried"], ("replicas", "replicas"))


def _chart(title: str, caption: str, outcomes: list[dict[str, Any]], axis: tuple[str, str]) -> "Chart":
    """Return a chart of p50 and p99; where queues only grow there is no point."""
    from loadtest.report.charts import BLUE, ORANGE, TICKS, chart, line

    shown = [outcome for outcome in outcomes if outcome["requests"]]
    key, heading = axis
    traces = []
    for name, color in (("p99", ORANGE), ("p50", BLUE)):
        trace = line(
            [outcome[key] for outcome in shown], [outcome["latency_ms"][name] for outcome in shown], name, color
        )
        trace.mode = "lines+markers"
        trace.marker = {"size": 9, "symbol": ["circle" if outcome["holds"] else "x" for outcome in shown]}
        trace.hovertemplate = "%{y:.3g} ms"
        traces.append(trace)
    return chart(
        title,
        caption,
        traces,
        showlegend=True,
        xaxis={"title": heading},
        yaxis={"title": "milliseconds", "type": "log", "tickvals": TICKS, "ticktext": [f"{at:g}" for at in TICKS]},
    )
