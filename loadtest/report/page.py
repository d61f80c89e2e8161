"""Page: the report as one HTML file that opens without a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.judge.summary import load_file
from loadtest.record.results import Results
from loadtest.record.statistics import number
from loadtest.report.exports import replacing
from loadtest.report.terminal import MISMATCH_COLUMNS, facts, headline, latencies, load, mismatch_rows, plan_line


def write(results: Path, destination: Path) -> None:
    """Write the page of a result file; an existing file is replaced at once or not at all.

    Raises:
        BadInput: `results` is not a result file.
    """
    write_loaded(*load_file(results), destination)


def write_loaded(results: Results, values: dict[str, Any], destination: Path) -> None:
    """Write the page of a run that is in memory, with its document."""
    from loadtest.judge import compare
    from loadtest.report.charts import charts

    _replace(
        destination,
        _render(
            "page.html",
            values=values,
            headline=headline(values),
            plan_line=plan_line(values),
            facts=facts(values),
            latencies=latencies(values),
            mismatches=(MISMATCH_COLUMNS, mismatch_rows(values)),
            comparison=(compare.COLUMNS, compare.rows(values["comparison"])) if "comparison" in values else None,
            plan=_plan(values["plan"]),
            started=results.header.get("clock_start", ""),
            versions=results.header.get("versions", {}),
            charts=charts(results, values),
        ),
    )


def write_several(runs: Sequence[tuple[str, dict[str, Any]]], destination: Path) -> None:
    """Write the page that puts several runs beside each other.

    Args:
        runs: a name and the document of each.
        destination: the page; an existing file is replaced at once or not at all.
    """
    from loadtest.report.charts import against_rate

    rows = [(name, load(values["plan"]), values) for name, values in sorted(runs, key=_achieved)]
    _replace(destination, _render("several.html", rows=rows, charts=[against_rate(runs)]))


def _achieved(run: tuple[str, dict[str, Any]]) -> float:
    return float(run[1]["rate"]["achieved"])


def _replace(destination: Path, html: str) -> None:
    with replacing(destination) as file:
        file.write(html)


def _render(template: str, **values: Any) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.PackageLoader("loadtest.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(number=number, plotly=get_plotlyjs(), **values)


def _plan(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what of the plan applies, with units."""
    units = {"duration": " s", "timeout": " s", "warmup": " s", "think": " s", "rate": " requests/s"}
    only_open = {"arrival", "profile", "seed", "in_flight", "speed"}
    return [
        (name.replace("in_flight", "most in flight"), f"{value}{units.get(name, '')}")
        for name, value in plan.items()
        if value not in (None, "", (), []) and (plan["concurrency"] is None or name not in only_open)
    ]
