"""Play: the phases of a scenario, one after another, and one document of them all."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.judge import thresholds
from loadtest.judge.validity import GONE
from loadtest.load import memory
from loadtest.record import results
from loadtest.record.statistics import number
from loadtest.record.table import table
from loadtest.report.terminal import load
from loadtest.scenario.judges import JUDGES, Finding, Played
from loadtest.scenario.scenario import Phase, Scenario, phases, resolved
from modelathe import files
from modelathe.commandline import document, finite
from modelathe.errors import BadInput, ModelatheError

Send = Callable[[str, dict[str, Any], Path], dict[str, Any]]
"""Sends one phase: from its name, its options and the result file to the run's document."""

SATURATION = "saturation.jsonl"
DOCUMENT = "scenario.json"
_UNFINISHED = Finding("end", None, "the scenario was not played to its end")


def play(scenario: Scenario, name: str, send: Send, folder: Path, largest: int = 1, source: str = "") -> dict[str, Any]:
    """Send the phases and return the document of them all, which is written to `folder` too.

    Args:
        scenario: what to send.
        name: what to call it.
        send: sends one phase.
        folder: for the result files; it must not hold any yet.
        largest: the largest batch that the model takes.
        source: of the server's memory, as `memory.reader` takes it; empty watches none.

    Raises:
        BadInput: the folder is not empty or cannot be made.
    """
    results.check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rate = _saturation(scenario, send, folder)
    judge, played = JUDGES[scenario.verdict], list[Played]()

    def written(findings: Sequence[Finding], complete: bool = True) -> dict[str, Any]:
        values = _document(scenario, name, played, findings, rate)
        if not complete and values["valid"]:
            values |= {
                "valid": False,
                "why": "the scenario was not played to its end",
                "fix": "play it again",
                "fault": "",
            }
        files.write(folder / DOCUMENT, json.dumps(finite(values), indent=1, default=str))
        return values

    with memory.watched(source) as watched:
        for place, phase in enumerate(phases(scenario, largest), 1):
            path = folder / f"{place:02}-{phase.name}.jsonl"
            try:
                played.append(_phase(scenario, resolved(phase, rate), send, path))
            except ModelatheError as error:
                # What was measured before the server went away is worth keeping.
                error.partial = written([_UNFINISHED], complete=False) if played else {}
                raise
            written([_UNFINISHED], complete=False)  # so that a killed run leaves a document too
            if _broken(played[-1]) or judge.enough(played):
                break
    return written(_unanswered(played) or judge.judge(played, watched))


def _unanswered(played: Sequence[Played]) -> list[Finding]:
    """Return what is found instead of the verdict where a phase leaves nothing to judge."""
    return [
        Finding("answers", False, f"nothing to judge in phase {phase.name}: {phase.document['why']}")
        for phase in played
        if _broken(phase)
    ]


def _broken(phase: Played) -> bool:
    """Return whether a phase leaves nothing to judge: no answer, or a server that went away."""
    requests = phase.document["requests"]
    return not requests["done"] + requests["mismatched"] or _gone(phase)


def _gone(phase: Played) -> bool:
    return bool(phase.document["fault"] == GONE)


def _saturation(scenario: Scenario, send: Send, folder: Path) -> float | None:
    """Return the requests per second of a short closed loop, where shares of it are asked for."""
    if not scenario.relative:
        return None
    found = send("saturation", scenario.options() | asdict(scenario.saturation), folder / SATURATION)
    if not found["rate"]["achieved"]:
        raise BadInput("the server answered nothing, so there is no saturation to take a share of", fix=found["fix"])
    return float(found["rate"]["achieved"])


def _phase(scenario: Scenario, phase: Phase, send: Send, path: Path) -> Played:
    sentences = (*scenario.thresholds, *phase.thresholds)
    found = send(phase.name, scenario.options() | phase.options() | {"thresholds": sentences}, path)
    found["thresholds"] = thresholds.judge(found, sentences)
    return Played(phase.name, found, path)


def _document(
    scenario: Scenario, name: str, played: Sequence[Played], findings: Sequence[Finding], rate: float | None
) -> dict[str, Any]:
    first = played[0].document
    # A server that went away says more than a request that left late.
    invalid = sorted((phase for phase in played if not phase.document["valid"]), key=lambda phase: not _gone(phase))
    bad = invalid[0] if invalid else None
    judged = [{"phase": phase.name, **one} for phase in played for one in phase.document["thresholds"]]
    asked = [finding for finding in findings if finding.passed is not None or not finding.optional]
    outcomes = [finding.passed for finding in asked] + [one["passed"] for one in judged]
    return document(
        valid=bad is None,
        why=f"phase {bad.name}: {bad.document['why']}" if bad else "",
        fix=bad.document["fix"] if bad else "",
        fault=bad.document["fault"] if bad else "",
        scenario=name,
        description=scenario.description,
        model=first["model"],
        url=first["url"],
        saturation=rate,
        verdict={
            "passed": False if False in outcomes else None if None in outcomes else True,
            "findings": [asdict(finding) for finding in findings],
        },
        thresholds=judged,
        phases=[{"name": phase.name, "results": str(phase.path), **phase.document} for phase in played],
    )


def headline(values: dict[str, Any]) -> str:
    """Return the first line of a scenario's report."""
    passed = values["verdict"]["passed"]
    word = "passed" if passed else "FAILED" if passed is False else "not judged in full"
    if not values["valid"]:
        word = "INVALID RUN"
    return f"{word}: scenario {values['scenario']}, {len(values['phases'])} phases on {values['model']}"


def text(values: dict[str, Any]) -> RenderableType:
    """Return the report of a scenario for a terminal."""
    good = values["valid"] and values["verdict"]["passed"]
    parts: list[RenderableType] = [Text(headline(values), style="bold green" if good else "bold red")]
    if values["why"]:
        parts.append(Text(f"why: {values['why']}", style="red"))
    for finding in values["verdict"]["findings"]:
        parts.append(Text(finding["text"], style="red" if finding["passed"] is False else ""))
    valid = {phase["name"]: phase["valid"] for phase in values["phases"]}
    for one in values["thresholds"]:
        # The sentence may be true of an invalid phase, and a FAILED beside it would puzzle.
        line = thresholds.line(one) if valid[one["phase"]] else f"not judged, the phase is invalid: {one['text']}"
        parts.append(Text(f"{one['phase']}: {line}", style="" if one["passed"] else "red"))
    if values["saturation"]:
        parts.append(Text(f"saturation: {number(values['saturation'])} requests/s"))
    return Group(*parts, Text(), _table(values))


def _table(values: dict[str, Any]) -> Table:
    shown = table("phase", "load", "batch", "req/s", "p50", "p99", "failed", "", figures=slice(2, 7))
    for phase in values["phases"]:
        requests, latency = phase["requests"], phase["latency_ms"]
        shown.add_row(
            phase["name"],
            load(phase["plan"]),
            str(phase["parts"][0]["batch"]),
            number(phase["rate"]["achieved"]),
            number(latency["p50"]),
            number(latency["p99"]),
            str(requests["failed"] + requests["dropped"] + requests["mismatched"]),
            "" if phase["valid"] else "invalid",
        )
    return shown
