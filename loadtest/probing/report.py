"""Report: what a search found, as a document and in a line."""

from collections.abc import Sequence
from typing import Any

from loadtest.probing.probe import Condition
from loadtest.probing.search import HELD, UNDECIDED, USELESS, Found, held_although_late
from modelathe.commandline import document
from modelathe.errors import Refused


def document_of(found: Found, asked: Sequence[Condition], slo: str) -> dict[str, Any]:
    """Return the document of a search for the objective `slo`."""
    probes = [
        {
            "rate": probe.rate,
            "verdict": said,
            "why": probe.fault or probe.client,
            "bad": {one.text: int(bad.sum()) for one, bad in zip(asked, probe.bad, strict=True)},
            "counted": {one.text: int(counted.sum()) for one, counted in zip(asked, probe.counted, strict=True)},
            **probe.facts,
        }
        for probe, said in zip(found.probes, found.verdicts, strict=True)
    ]
    late = 0.0 if any(one.threshold.metric.group == "service_ms" for one in asked) else _late(found, asked)
    return document(
        slo=slo,
        conditions=[{"text": one.text, "allowed": one.allowed} for one in asked],
        rate=found.rate,
        low=found.low,
        high=found.high,
        at_least=found.high == float("inf"),
        binding=None if found.binding is None else asked[found.binding].text,
        stopped=found.stopped,
        held_although_late=late or None,
        notes=[*_notes(found, asked), *_all_the_same(late, found)],
        probes=probes,
    )


def _late(found: Found, asked: Sequence[Condition]) -> float:
    return held_although_late(found.probes, [one.allowed for one in asked])


def _all_the_same(late: float, found: Found) -> list[str]:
    """Say what probes show that do not count, where that is more than those show that do."""
    if not late > (0.0 if found.rate != found.rate else found.rate):
        return []
    return [
        f"{late:,.1f}/s held all the same, with the client's own lateness in every latency: "
        "a server that answers in order holds it"
    ]


def _notes(found: Found, asked: Sequence[Condition]) -> list[str]:
    notes = []
    if found.binding is not None and asked[found.binding].limit is None:
        notes.append(f"{asked[found.binding].text!r} is what fails first, before any latency")
    limited = next((probe for probe in reversed(found.probes) if probe.client), None)
    if limited:
        notes.append(f"the client could not send {limited.rate:,.1f}/s: {limited.client}")
    broken = next((probe for probe in found.probes if probe.fault), None)
    if broken:
        notes.append(f"at {broken.rate:,.1f}/s the server did not follow: {broken.fault}")
    return notes


def _counting(values: dict[str, Any]) -> list[float]:
    return [probe["rate"] for probe in values["probes"] if probe["verdict"] not in USELESS]


def _failed(values: dict[str, Any]) -> bool:
    return any(probe["verdict"] not in (HELD, UNDECIDED, *USELESS) for probe in values["probes"])


def refusal(values: dict[str, Any]) -> Refused:
    """Return the failure of a search that found no rate."""
    counting = _counting(values)
    if not counting:
        why = "; ".join(dict.fromkeys(probe["why"] or values["stopped"] for probe in values["probes"]))
        fix = "use a client machine that has nothing else to do, or begin lower with --start"
        return Refused(f"no probe counted: {why}", where=values["model"], fix=fix)
    return Refused(
        f"no rate held {values['slo']!r}: {values['stopped']} (the lowest was {min(counting):,.1f}/s)",
        where=values["model"],
        fix="allow more, make the model faster, or find what fails with `loadtest run`"
        if _failed(values)
        else "give it more time to decide: a longer --duration and --budget",
    )


def headline(values: dict[str, Any]) -> str:
    """Return the capacity in one line."""
    if values["rate"] != values["rate"]:
        unknown = "decided" if _counting(values) else "counted"
        return f"no rate holds {values['slo']}" if _failed(values) else f"capacity unknown: no probe {unknown}"
    if values["at_least"]:
        return f"capacity: at least {values['rate']:,.4g} requests/s hold {values['slo']}"
    interval = f"95 % interval {values['low']:,.4g} to {values['high']:,.4g}"
    return (
        f"capacity: {values['rate']:,.4g} requests/s hold {values['slo']} ({interval}); {values['binding']} fails first"
    )
