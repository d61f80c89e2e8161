"""Plan: how many replicas hold an objective at a rate, and what follows from that, as one document."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from serve.planning.cases import Asked, cases, needed, target
from serve.planning.fleet import CELL, LOADED, LOADED_CELL, Fleet, Outcome, simulate
from serve.planning.search import MOST, Search, Tell, highest
from serve.planning.served import left_out

Report = Callable[[str, float], None]
BELOW = (0.25, 0.5, 0.75)
"""Shares of the rate at which the planned fleet is looked at too, for the curve of latency over rate."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a plan, beside the fleet.

    Args:
        rate: requests per second, of one sample each.
        asked: what may happen to the fleet.
        growth: of the traffic, as a share in a minute, that replicas must carry until a new one helps.
        most: replicas that are tried at the most.
    """

    rate: float
    asked: Asked
    growth: float = 0.1
    most: int = MOST


def make(fleet: Fleet, wanted: Wanted, report: Report) -> dict[str, Any]:
    """Return the plan.

    Args:
        fleet: what is planned for.
        wanted: what is asked.
        report: told what goes on, as `modelathe.commandline.reporting` yields it.

    Raises:
        Refused: no number of replicas holds the objective.
    """
    stage = "looking for the smallest number of replicas"

    def tell(outcome: Outcome) -> None:
        says = "holds" if outcome.holds else "does not hold"
        report(f"{stage}: {outcome.replicas:,} at {outcome.rate:,.0f}/s, {says}", 0.0)

    search = Search(fleet, wanted.rate, wanted.most, tell)
    smallest = search.smallest()
    replicas = needed(smallest, wanted.asked)
    stage = "what may happen"
    found = list(cases(search, smallest, replicas, wanted.asked))
    stage = "looking for the highest rate of replicas"
    headroom, curve = _headroom(search, smallest, tell)
    most, curve = (headroom, curve) if replicas == smallest else _headroom(search, replicas, tell)
    knee = most["rate"] / replicas
    return {
        "objective": fleet.objective.text,
        "rate": wanted.rate,
        "arrival": fleet.arrivals.text,
        "balance": fleet.balancer.name,
        "configuration": asdict(fleet.configuration),
        "smallest": {**search.at(smallest).document(), "headroom": headroom},
        "replicas": replicas,
        "planned": {**search.at(replicas).document(), "headroom": most},
        "binding": _binding(curve, most["rate"]),
        "cases": [case.document() for case in found],
        "knee": knee,
        "per_pod_rate": target(knee, replicas, wanted.asked, wanted.growth),
        "start_seconds": wanted.asked.start,
        "reacts_seconds": wanted.asked.reacts,
        "growth": wanted.growth,
        "curve": [outcome.document() for outcome in sorted(curve, key=lambda outcome: outcome.rate)],
        "tried": [search.tried[number].document() for number in sorted(search.tried)],
        "notes": _notes(fleet, search, wanted, search.at(smallest)),
    }


def _headroom(search: Search, replicas: int, tell: Tell) -> tuple[dict[str, float], list[Outcome]]:
    """Return the rate up to which so many replicas hold, as a share of the asked one too, and what was simulated."""
    looked = [simulate(search.fleet, replicas, share * search.rate) for share in BELOW]
    looked.append(search.at(replicas))

    def keep(outcome: Outcome) -> None:
        looked.append(outcome)
        tell(outcome)

    rate = highest(search.fleet, replicas, search.rate, keep)
    return {"rate": rate, "ratio": rate / search.rate}, looked


def _binding(curve: list[Outcome], rate: float) -> str:
    """Return what is broken first above a rate."""
    broken = [outcome for outcome in curve if outcome.rate > rate and not outcome.holds]
    first = min(broken, key=lambda outcome: outcome.rate, default=None)
    return first.binding.text if first and first.requests else "queues only grow"


def _notes(fleet: Fleet, search: Search, wanted: Wanted, smallest: Outcome) -> list[str]:
    """Return what a reader of the plan must know of how it was made."""
    loaded, largest = fleet.balancer.name == "least-loaded", max(search.tried)
    notes = list(left_out(fleet.configuration)) if loaded else []
    most = LOADED_CELL if fleet.one_by_one else CELL
    if largest > most and fleet.arrivals.recorded is None:
        notes.append(f"of more than {most:,} replicas, {most:,} are simulated with their share of the rate")
    if fleet.one_by_one and fleet.requests > LOADED:
        what = "a balancer that looks at the load" if loaded else "a delay, preferred sizes or a limit of the queue"
        notes.append(f"{what} is simulated request by request, {LOADED:,} of them")
    if any(one.hardly for one in smallest.judged):
        notes.append(f"whether {smallest.replicas:,} hold it is not certain: more --requests tell")
    if fleet.balancer.name == "pinned":
        notes.append("connections are pinned: a new replica gets nothing until clients connect anew")
    if fleet.configuration.instances > len(fleet.curve.together):
        notes.append("what several instances cost each other was not measured: see `together` in the file of times")
    if wanted.asked.start is None:
        notes.append(
            "no target for an autoscaler: say --start-seconds, from the start of a replica to its first answer"
        )
    if any(one.metric.key == "failed" for one in fleet.objective.conditions):
        notes.append(
            "errors: those of a full queue or of a wait too long, as the configuration limits them; what is inside a"
            " lost replica is lost with it too, see lost_requests"
        )
    return notes
