"""Cases: what a planned fleet does when something is gone, when traffic comes in bursts, and while it is updated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from modelathe.errors import Refused
from serve.planning.arrivals import BURST, Arrivals
from serve.planning.engines.balancers import Balancer
from serve.planning.fleet import Outcome
from serve.planning.search import Search

SCALER = 75.0
"""Seconds until an autoscaler has seen more traffic: a rate over a minute, looked at every 15 seconds."""


@dataclass(frozen=True)
class Asked:
    """What may happen to the fleet.

    Args:
        fail: replicas that are lost at once; 0 for none.
        zones: over which the replicas are spread evenly; below 2 none is lost.
        unavailable: replicas that a rolling update takes away at a time; 0 for none.
        start: seconds from the start of a replica to its first answer; None where that is not known.
    """

    fail: int = 1
    zones: int = 0
    unavailable: int = 0
    start: float | None = None

    @property
    def reacts(self) -> float | None:
        """Return the seconds from more traffic to a new replica that helps, behind an autoscaler."""
        return None if self.start is None else SCALER + self.start


@dataclass(frozen=True)
class Case:
    """One thing that may happen.

    Args:
        name: of it, in a word.
        text: of it, for people.
        outcome: of what is left.
        needed: the smallest number of replicas, before it happens, that holds the objective all the same; None where no
            number does.
        more: what else is known of it.
    """

    name: str
    text: str
    outcome: Outcome
    needed: int | None
    more: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"case": self.name, "text": self.text, "needed": self.needed, **self.more, **self.outcome.document()}


def needed(smallest: int, asked: Asked) -> int:
    """Return the smallest fleet of which enough is left when a replica, or a zone, or what is updated is away."""
    zoned = smallest
    while asked.zones > 1 and zoned - ceil(zoned / asked.zones) < smallest:
        zoned += 1
    return max(smallest + asked.fail, zoned, smallest + asked.unavailable)


def cases(search: Search, smallest: int, replicas: int, asked: Asked) -> Iterator[Case]:
    """Yield what may happen to a fleet of `replicas`, where `smallest` is the smallest number that holds."""
    whole = search.at(replicas)

    def away(name: str, text: str, count: int, enough: int, **more: Any) -> Case:
        # What is inside a replica dies with it.
        told = {"lost_requests": count * whole.inside} if name != "update" else {}
        return Case(name, text, search.at(replicas - count), enough, {**told, **more})

    if asked.fail:
        text = "1 replica lost" if asked.fail == 1 else f"{asked.fail} replicas lost"
        yield away("replica", text, asked.fail, smallest + asked.fail)
    if asked.zones > 1:
        out = ceil(replicas / asked.zones)
        yield away("zone", f"1 of {asked.zones} zones lost", out, needed(smallest, Asked(0, asked.zones)))
    if search.fleet.balancer.name != "pinned":
        yield _burst(search, smallest, replicas)
    each = asked.start
    lasts = {"seconds": None if each is None else replicas * each}
    yield Case("update", "rolling update, 1 more", whole, smallest, {"surge": 1, "unavailable": 0, **lasts})
    if asked.unavailable:
        out = asked.unavailable
        lasts = {"seconds": None if each is None else ceil(replicas / out) * each}
        text = f"rolling update, {out} away"
        yield away("update", text, out, smallest + out, surge=0, unavailable=out, **lasts)


def _burst(search: Search, smallest: int, replicas: int) -> Case:
    """Return what bursts do that reach each replica whole: a balancer that spreads them makes less of them."""
    fleet = search.fleet
    variation = max(BURST, 2 * fleet.arrivals.variation)
    arrivals = Arrivals(f"gamma:{variation:g}", variation)
    # Cells of one replica have arrivals of their own.
    each = replace(fleet, arrivals=arrivals, balancer=Balancer("round-robin"), cell=1)
    bursty = Search(each, search.rate, search.most)
    outcome = bursty.at(replicas)
    enough = _or_none(lambda: bursty.smallest(smallest - 1))
    return Case("burst", f"bursts at each, gamma:{variation:.3g}", outcome, enough, {"variation": variation})


def _or_none(find: Callable[[], int]) -> int | None:
    try:
        return find()
    except Refused:
        return None


def target(knee: float, replicas: int, asked: Asked, growth: float) -> float | None:
    """Return what an autoscaler should hold each replica at, in requests per second.

    That is the knee, the highest rate of a replica that holds the objective, less what the others take over when as
    many as asked are lost, and less what traffic grows by until a new replica helps. None where it is not known when
    one does.

    Args:
        knee: requests per second of a replica.
        replicas: of the plan.
        asked: what may happen.
        growth: of the traffic, as a share in a minute.
    """
    kept = (replicas - asked.fail) / replicas if replicas > asked.fail else 0.0
    return None if asked.reacts is None else knee * kept / (1 + growth * asked.reacts / 60)
