"""Page: the report as one HTML file that opens without a network."""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.judge.summary import load_file
from loadtest.record.results import Results
from loadtest.record.statistics import number
from loadtest.report.exports import replacing
from loadtest.report.terminal import MISMATCH_COLUMNS, facts, headline, latencies, load, mismatch_rows, plan_line

if TYPE_CHECKING:
    import jinja2

GAIN = 0.05
"""Share of more throughput below which a run beyond another brought nothing."""

Knee = tuple[dict[str, Any] | None, str]
"""The run at which more load brings no more, or None; and what it is, or why there is none."""


@cache
def plotly() -> str:
    """Return the script that draws the charts: Plotly's basic bundle, a quarter of the whole one."""
    return files("loadtest.report").joinpath("vendored/plotly-basic.min.js").read_text(encoding="utf-8")


def write(results: Path, destination: Path) -> None:
    """Write the page of a result file; an existing file is replaced at once or not at all.

    Raises:
        BadInput: `results` is not a result file.
    """
    write_loaded(*load_file(results), destination)


def write_loaded(results: Results, values: dict[str, Any], destination: Path) -> None:
    """Write the page of a run that is in memory, with its document."""
    save("page.html", destination, **_shown(results, values))


def body(values: dict[str, Any], results: Path | None) -> str:
    """Return the page of a run as a part of another page, without heading, script and style sheet.

    Args:
        values: the run's document.
        results: its result file, which the charts are drawn from; without it there are none.

    Raises:
        BadInput: `results` is not a result file.
    """
    found = None if results is None else load_file(results)[0]
    return environment().get_template("load.html").render(**_shown(found, values))


def _shown(results: Results | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return what the template of one run shows."""
    from loadtest.judge import compare
    from loadtest.report.charts import charts

    return {
        "values": values,
        "headline": headline(values),
        "plan_line": plan_line(values),
        "facts": facts(values),
        "latencies": latencies(values),
        "mismatches": (MISMATCH_COLUMNS, mismatch_rows(values)),
        "comparison": (compare.COLUMNS, compare.rows(values["comparison"])) if "comparison" in values else None,
        "plan": _plan(values["plan"]),
        "started": results.header.get("clock_start", "") if results else "",
        "versions": results.header.get("versions", {}) if results else {},
        "charts": charts(results, values) if results else [],
    }


def write_several(runs: Sequence[tuple[str, dict[str, Any]]], destination: Path) -> None:
    """Write the page that puts several runs beside each other.

    Args:
        runs: a name and the document of each.
        destination: the page; an existing file is replaced at once or not at all.
    """
    from loadtest.report.charts import against_rate

    ordered = sorted(runs, key=lambda run: float(run[1]["rate"]["achieved"]))
    found = [values for _, values in ordered]
    models = dict.fromkeys(values["model"] for values in found)
    best, why = knee(found)
    save(
        "several.html",
        destination,
        title=f"{len(runs)} load runs on {', '.join(models)}",
        servers=list(dict.fromkeys(values["url"] for values in found)),
        objective=_objective(found),
        knee=best,
        knee_of=why,
        rows=[(name, load(values["plan"]), values) for name, values in ordered],
        charts=[against_rate(runs)],
    )


def _objective(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the thresholds that all runs state."""
    stated = [[one["text"] for one in values["thresholds"]] for values in runs]
    return [text for text in stated[0] if all(text in one for one in stated)]


def knee(runs: Sequence[dict[str, Any]]) -> Knee:
    """Return the run at which more load brings no more.

    That is the fastest one that keeps the objective of all, or where they state none, the first whose throughput is
    that of the best but for `GAIN`. Where the fastest run of all is that one, the knee lies beyond what was tried.

    Args:
        runs: their documents, by the rate that they achieved.
    """
    valid = [values for values in runs if values["valid"]]
    if not valid:
        return None, "no run is valid"
    if _objective(runs):
        kept = [values for values in valid if all(one["passed"] for one in values["thresholds"])]
        if not kept:
            return None, "no run holds the objective"
        if kept[-1] is runs[-1]:
            return None, f"the fastest run, {number(kept[-1]['rate']['achieved'])} requests/s, holds the objective"
        return kept[-1], "the fastest run that holds the objective"
    most = valid[-1]["rate"]["achieved"]
    first = next(values for values in valid if values["rate"]["achieved"] >= most / (1 + GAIN))
    if first is valid[-1]:
        return None, f"throughput rose to the fastest run, {number(most)} requests/s"
    return first, f"beyond which more load brought less than {GAIN:.0%} more throughput"


def save(template: str, destination: Path, **values: Any) -> None:
    """Write a page of this folder's templates; an existing file is replaced at once or not at all."""
    with replacing(destination) as file:
        file.write(environment().get_template(template).render(plotly=plotly(), **values))


def environment() -> "jinja2.Environment":
    """Return what renders this folder's templates."""
    import jinja2

    loader = jinja2.PackageLoader("loadtest.report", "templates")
    found = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals.update(number=number)
    return found


def _plan(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what of the plan applies, with units."""
    units = {"duration": " s", "timeout": " s", "warmup": " s", "think": " s", "rate": " requests/s"}
    only_open = {"arrival", "profile", "seed", "in_flight", "speed"}
    return [
        (name.replace("in_flight", "most in flight"), f"{value}{units.get(name, '')}")
        for name, value in ((name, _told(value)) for name, value in plan.items())
        if value not in (None, "", (), []) and (plan["concurrency"] is None or name not in only_open)
    ]


def _told(value: Any) -> Any:
    """Return a value of the plan as a person reads it: of several options those that are set, a list item by item."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {one}" for name, one in value.items() if one)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
