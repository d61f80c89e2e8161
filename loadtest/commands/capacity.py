"""`loadtest capacity`: the highest rate that holds an objective."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import Duration, Number, Share, default_output, kept, load_options, parts_of, plan_of
from modelathe.commandline import PATH, document, emit, json_option
from modelathe.errors import Refused, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from loadtest.probing.probe import Condition
    from loadtest.probing.search import Found, Probe

_PROBES_DECIDE = {"concurrency": None, "rate": 1.0, "profile": None, "trace": None, "speed": 1.0}
_PROBES_DECIDE |= {"requests": None, "think": 0.0, "in_flight": None}


@click.command()
@click.argument("model")
@click.option("--slo", required=True, metavar="SENTENCES", help='What must hold, as "p99 < 20ms, errors < 0.1%".')
@load_options
@click.option("--start", type=Number(min=0, min_open=True), help="The first rate.  [default: from a short closed loop]")
@click.option("--precision", type=Share(), default="5%", show_default=True, help="Half the width of the interval.")
@click.option(
    "--budget", type=Duration(), default="150s", show_default=True, help="Start no probe near the edge after it."
)
@click.option("--output", type=PATH, metavar="DIR", help="A new folder for the results of the probes.")
@json_option
def capacity(
    model: str,
    slo: str,
    start: float | None,
    precision: float,
    budget: float,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the highest rate at which MODEL holds an objective, with a 95 % interval.

    Short open-loop runs (--duration each, Poisson arrivals unless --arrival says otherwise) are placed near the edge
    until the interval is narrow or the time is spent. The objective speaks of shares of the requests: percentiles of
    latency or service, errors, timeouts, mismatches. Where it says nothing of errors, "errors < 1%" is added.

    \b
    Example:
      loadtest capacity digits --url grpc://127.0.0.1:8001 \\
          --slo "p99 < 20ms, errors < 0.1%"
    """
    from loadtest.plan.schedule import FASTEST
    from loadtest.probing import probe
    from loadtest.probing.search import Budget, search
    from loadtest.record import results

    asked = probe.conditions([slo])
    if start is not None and not 0 < start <= FASTEST:
        raise UsageError(f"--start is {start:g}", fix=f"give a rate above 0 and of at most {FASTEST:g}")
    folder = output or default_output(f"capacity-{model}")
    results.check_new(folder)
    options["arrival"] = options["arrival"] or "poisson"
    plan = plan_of(options | _PROBES_DECIDE)
    parts = parts_of(plan, model, options)
    folder.mkdir(parents=True, exist_ok=True)
    spending = Budget(plan.duration, budget)
    guess = probe.guess(plan, parts)
    with kept(folder):
        found = search(
            probe.prober(plan, parts, asked, folder, _say if not as_json else lambda _: None),
            [one.allowed for one in asked],
            start or guess,
            spending,
            tolerance=precision,
            highest=FASTEST * plan.workers,
        )
    values = _document(found, asked, slo) | {"model": model, "url": plan.url, "seconds": spending.elapsed()}
    values["results"] = str(folder)
    values["precision"], values["arrival"] = precision, plan.arrival
    _finish(values, as_json)


# The probes decide on these; an option that is ignored would be a lie.
capacity.params = [option for option in capacity.params if option.name not in _PROBES_DECIDE]


def _say(probe: "Probe") -> None:
    p99, count = probe.facts["latency_ms"]["p99"], probe.facts["requests"]
    trouble = probe.fault or (f"does not count: {probe.client}" if probe.client else "")
    click.echo(f"{probe.rate:,.1f}/s: {count:,} requests, p99 {p99:.2f} ms {trouble}".rstrip(), err=True)


def _document(found: "Found", asked: "Sequence[Condition]", slo: str) -> dict[str, Any]:
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


def _late(found: "Found", asked: "Sequence[Condition]") -> float:
    from loadtest.probing.search import held_although_late

    return held_although_late(found.probes, [one.allowed for one in asked])


def _all_the_same(late: float, found: "Found") -> list[str]:
    """Say what probes show that do not count, where that is more than those show that do."""
    if not late > (0.0 if found.rate != found.rate else found.rate):
        return []
    return [
        f"{late:,.1f}/s held all the same, with the client's own lateness in every latency: "
        "a server that answers in order holds it"
    ]


def _notes(found: "Found", asked: "Sequence[Condition]") -> list[str]:
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


def _finish(values: dict[str, Any], as_json: bool) -> None:
    from rich.console import Console

    if not as_json:
        Console().print(_text(values))
        click.echo(f"\nresults: {values['results']}")
    if values["rate"] != values["rate"]:
        failure = _refusal(values)
        failure.partial = values
        raise failure
    if as_json:
        emit(values)


def _counting(values: dict[str, Any]) -> list[float]:
    from loadtest.probing.search import USELESS

    return [probe["rate"] for probe in values["probes"] if probe["verdict"] not in USELESS]


def _failed(values: dict[str, Any]) -> bool:
    from loadtest.probing.search import HELD, UNDECIDED, USELESS

    return any(probe["verdict"] not in (HELD, UNDECIDED, *USELESS) for probe in values["probes"])


def _refusal(values: dict[str, Any]) -> Refused:
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


def _text(values: dict[str, Any]) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from loadtest.record.table import table

    shown = table("rate/s", "requests", "p50 ms", "p99 ms", "bad", "verdict", figures=slice(5))
    for probe in values["probes"]:
        times = probe["latency_ms"]
        bad = max(probe["bad"][text] / max(probe["counted"][text], 1) for text in probe["bad"])
        cells = (f"{probe['rate']:,.1f}", f"{probe['requests']:,}", f"{times['p50']:.2f}", f"{times['p99']:.2f}")
        shown.add_row(*cells, f"{bad:.2%}", probe["verdict"])
    lines = [Text(headline(values), "bold")]
    lines += [Text(f"stopped: {values['stopped']}, after {values['seconds']:.0f} s, {len(values['probes'])} probes")]
    lines += [Text(f"note: {note}", "yellow") for note in values["notes"]]
    return Group(*lines, Text(), shown)


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
