"""`loadtest.capacity`, which the command `loadtest capacity` calls too."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from loadtest.calls import keywords
from loadtest.calls.keywords import LoadOptions, Place, Seconds, gather
from loadtest.calls.results import Capacity
from loadtest.plan.options import PROBES_DECIDE, Duration, Share, default_output, kept, parts_of, plan_of
from loadtest.plan.schedule import FASTEST
from loadtest.probing import probe, report
from loadtest.probing.search import Budget, Probe, search
from loadtest.record import results
from loadtest.report import live
from modelathe.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """How a search goes, beside the load that its probes send.

    Args:
        slo: what must hold.
        start: the first rate; None takes it from a short closed loop.
        precision: half the width of the interval, as a share.
        budget: seconds after which no probe is started near the edge.
        output: a new folder for the results of the probes; one in `build/loads` unless given.
    """

    slo: str
    start: float | None = None
    precision: float = 0.05
    budget: float = 150.0
    output: Path | None = None


class CapacityOptions(LoadOptions, total=False):
    """The options of the command `loadtest capacity`."""

    start: float
    precision: float | str
    budget: Seconds
    output: Place


def capacity(model: str, url: str, slo: str, *, quiet: bool = False, **options: Unpack[CapacityOptions]) -> Capacity:
    """Find the highest rate at which a model holds an objective, with a 95 % interval.

    Where no rate was found, the result is returned with `passed` False; `.check()` raises instead.

    Args:
        model: its name at the server.
        url: the server, as `grpc://HOST:PORT` or `http://HOST:PORT`.
        slo: what must hold, as `p99 < 20ms, errors < 0.1%`.
        quiet: say nothing while it goes on.
        options: those of the command, with underscores: `duration="2s"` of each probe, `budget="60s"`,
            `precision=0.1`.

    Raises:
        UsageError: a wrong objective or option.
        ServerAbsent, ServerFault, ModelMissing, RequestRejected: as for `loadtest.run`.
    """
    keywords.check(options, CapacityOptions.__annotations__)
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    own = {key: given.pop(key) for key in ("start", "precision", "budget", "output") if key in given}
    if decided := sorted(given.keys() & PROBES_DECIDE.keys()):
        raise UsageError(f"the probes decide on {decided[0]}", fix="leave it away, or use `loadtest.run`")
    kinds: dict[str, Callable[[Any], Any]] = {
        "start": float,
        "precision": lambda value: Share().convert(value, None, None),
        "budget": lambda value: Duration().convert(value, None, None),
        "output": Path,
    }
    asked = Asked(slo, **{key: keywords.converted(key, value, kinds[key]) for key, value in own.items()})
    return find(model, asked, gather(url, given), quiet=quiet)


def find(model: str, asked: Asked, options: dict[str, Any], *, quiet: bool) -> Capacity:
    """Search as `asked`, with probes that send what the options describe.

    Raises:
        As `capacity`.
    """
    conditions, start = probe.conditions([asked.slo]), asked.start
    if start is not None and not 0 < start <= FASTEST:
        raise UsageError(f"--start is {start:g}", fix=f"give a rate above 0 and of at most {FASTEST:g}")
    folder = asked.output or default_output(f"capacity-{model}")
    results.check_new(folder)
    options = options | PROBES_DECIDE | {"arrival": options["arrival"] or "poisson"}
    plan = plan_of(options)
    parts = parts_of(plan, model, options)
    folder.mkdir(parents=True, exist_ok=True)
    spending = Budget(plan.duration, asked.budget)
    guess = probe.guess(plan, parts)
    tell = live.teller(quiet)
    with kept(folder):
        found = search(
            probe.prober(plan, parts, conditions, folder, lambda made: tell(_line(made))),
            [one.allowed for one in conditions],
            start or guess,
            spending,
            tolerance=asked.precision,
            highest=FASTEST * plan.workers,
        )
    values = report.document_of(found, conditions, asked.slo)
    values |= {"model": model, "url": plan.url, "seconds": spending.elapsed(), "results": str(folder)}
    values |= {"precision": asked.precision, "arrival": plan.arrival}
    failure = report.refusal(values) if values["rate"] != values["rate"] else None
    if failure:
        failure.partial = values
    return Capacity.of(values, failure)


def _line(probe: Probe) -> str:
    p99, count = probe.facts["latency_ms"]["p99"], probe.facts["requests"]
    trouble = probe.fault or (f"does not count: {probe.client}" if probe.client else "")
    return f"{probe.rate:,.1f}/s: {count:,} requests, p99 {p99:.2f} ms {trouble}".rstrip()
