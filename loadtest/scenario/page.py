"""Page: a scenario as one HTML file: its verdict, and its phases on one timeline."""

from pathlib import Path
from typing import Any

from loadtest.record.results import read
from loadtest.report import page
from loadtest.report.terminal import load
from loadtest.report.timeline import Phase, timeline
from loadtest.scenario.play import headline

_TONES = {True: "good", False: "bad", None: "open"}
"""The classes of what passed, of what failed, and of what was not judged."""


def write(values: dict[str, Any], destination: Path) -> None:
    """Write the page of a scenario; an existing file is replaced at once or not at all.

    Args:
        values: the scenario's document; the result files that it names are read.
        destination: the page.

    Raises:
        BadInput: a result file is missing or none.
    """
    runs = [Phase(phase["name"], read(Path(phase["results"])), _tone(values, phase)) for phase in values["phases"]]
    findings = [{**finding, "tone": _TONES[finding["passed"]]} for finding in values["verdict"]["findings"]]
    page.save(
        "scenario.html",
        destination,
        values=values,
        headline=headline(values),
        tone=_TONES[values["verdict"]["passed"]] if values["valid"] else "bad",
        findings=findings,
        invalid=[phase["name"] for phase in values["phases"] if not phase["valid"]],
        load=load,
        charts=timeline(runs),
    )


def _tone(values: dict[str, Any], phase: dict[str, Any]) -> str:
    """Return the class of a phase: what its thresholds say, unless it is invalid."""
    judged = [one for one in values["thresholds"] if one["phase"] == phase["name"]]
    if not phase["valid"] or any(not (one["passed"] or one["undecided"]) for one in judged):
        return "bad"
    return "good" if judged and all(one["passed"] for one in judged) else "open"
