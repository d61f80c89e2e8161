"""Capacity: the highest open-loop rate at which a server holds its objectives, from a few short runs.

`search` asks a function for one probe after the other and never touches a server. The rate is bracketed by doubling and
halving; then each probe goes where `loadtest.probing.edge` says that the edge is, a little above and a little below in
turn, until the interval is narrow or the time is spent. All probes that count make the estimate, not the last ones
alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, kendalltau

from loadtest.probing import edge
from loadtest.probing.edge import Counts, Edge

LEVEL = 0.95
LOWEST = 0.5
"""Requests a second below which no rate is tried."""

HELD, FAILED, UNDECIDED, GROWING = "held", "failed", "undecided", "growing"
SETTLING, CLIENT, DISTURBED = "settling", "client", "disturbed"
"""Verdicts of a probe. In the last three the server is not to blame, or not yet: they do not count."""

USELESS = (SETTLING, CLIENT, DISTURBED)

NARROW = "the interval is narrow enough"
SPENT = "the time was spent"
NONE_HOLDS = "even the lowest rate did not hold"
CLIENT_LIMIT = "the client was the limit"
DISTURBANCE = "something else on the client's machine kept holding it up"
UNSETTLED = "the latency of the server did not settle"
HIGHEST = "no higher rate may be asked of one client"

_OFFSETS = (1.05, 0.97)
_NEAR = 1.5
_FEWEST = 6
_CEILING = 1.1
_MOST_REPEATS = 4
_TRIES = 3
_MOST_DISTURBED = 10
"""An idle client is late when its machine is elsewhere for a moment; the next probe may well count."""

_BRACKET_SECONDS, _BRACKET_REQUESTS = 3.0, 300
_TREND_CHANCE, _TREND_GROWTH = 0.001, 1.5


@dataclass(frozen=True)
class Probe:
    """What a short run at one rate showed; arrays have one element for each of `edge.BLOCKS` stretches of time.

    Args:
        rate: requests per second that were due.
        counted: requests that each condition speaks of, int64 of shape (conditions, blocks).
        bad: how many of them did not meet it, likewise.
        latency: mean latency in seconds, float64 of shape (blocks,); NaN where nothing was answered.
        fault: why the server fails whatever the counts say, such as a full backlog; empty if it does not.
        client: why the client was not able to send this load; empty if it was.
        idle: whether the client had cores to spare, so that its own limit was not the reason.
        facts: what to show of it.
    """

    rate: float
    counted: NDArray[np.int64]
    bad: NDArray[np.int64]
    latency: NDArray[np.float64]
    fault: str = ""
    client: str = ""
    idle: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def growth(self) -> float:
        """By what factor the latency changed, see `trend`."""
        return trend(self.latency)

    def counts(self, condition: int) -> Counts:
        """Return what it says of one condition; a queue that grows holds nothing, had it only gone on."""
        counted, bad = self.counted[condition], self.bad[condition]
        growing = condition == 0 and (self.fault or self.growth > 1)
        return Counts(self.rate, counted, counted if growing else bad)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        rate: the estimate in requests per second, NaN when not even the lowest rate held; at least so much when `high`
            is infinite.
        low, high: the interval that holds the true rate with a probability of `LEVEL`.
        stopped: one of the reasons above.
        binding: the number of the condition that comes first; None where no condition was seen to fail.
        probes: all of them, also those that do not count.
        verdicts: one for each probe.
    """

    rate: float
    low: float
    high: float
    stopped: str
    binding: int | None
    probes: list[Probe]
    verdicts: list[str]


@dataclass(frozen=True)
class Budget:
    """The time that a search may take, which begins when this is made.

    Args:
        probe: seconds of a probe near the edge; those that only bracket it are shorter.
        total: seconds within which the last probe must end.
        clock: tells the seconds.
    """

    probe: float
    total: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begun", self.clock())

    def elapsed(self) -> float:
        """Return the seconds that were spent."""
        return self.clock() - self.begun

    def spent(self) -> bool:
        """Return whether there is no time left for a probe."""
        return self.elapsed() + self.probe >= self.total


def search(
    probe: Callable[[float, float], Probe],
    allowed: Sequence[float],
    start: float,
    budget: Budget,
    *,
    tolerance: float = 0.05,
    highest: float = float("inf"),
) -> Found:
    """Return the highest rate at which no condition has more bad requests than allowed.

    Args:
        probe: runs at a rate (requests per second) for some seconds.
        allowed: share of bad requests for each condition, above 0.
        start: the first rate.
        budget: how long a probe and the whole search may take.
        tolerance: half the width of a narrow interval, as a share of the rate.
        highest: the highest rate to try.
    """
    known = _Known(allowed, tolerance, highest)
    while True:
        rate = known.next(start)
        if isinstance(rate, str):
            return known.found(rate)
        if known.probes and budget.spent():
            return known.found(SPENT)
        length = budget.probe if known.near else min(budget.probe, max(_BRACKET_SECONDS, _BRACKET_REQUESTS / rate))
        known.add(probe(rate, length))


class _Known:
    """What the probes so far say."""

    def __init__(self, allowed: Sequence[float], tolerance: float, highest: float) -> None:
        self.allowed, self.tolerance, self.highest = allowed, tolerance, highest
        self.probes: list[Probe] = []
        self.verdicts: list[str] = []
        self.near = 0

    def add(self, probe: Probe) -> None:
        self.probes.append(probe)
        self.verdicts.append(verdict(probe, self.allowed))

    def counting(self) -> list[Probe]:
        return [probe for probe, said in zip(self.probes, self.verdicts, strict=True) if said not in USELESS]

    def split(self) -> tuple[list[float], list[float]]:
        """Return the rates that held and those that did not, by what was counted, decided or not."""
        good: list[float] = []
        poor: list[float] = []
        for probe in self.counting():
            (good if all(map(_holds, self._counts(probe), self.allowed)) else poor).append(probe.rate)
        return good, poor

    def _counts(self, probe: Probe) -> list[Counts]:
        return [probe.counts(condition) for condition in range(len(self.allowed))]

    def next(self, start: float) -> float | str:
        """Return the rate to try next, or why to stop."""
        if not self.probes:
            return min(start, self.highest)
        useless = self.verdicts[-_MOST_REPEATS:]
        if useless.count(SETTLING) == _MOST_REPEATS:
            return UNSETTLED
        good, poor = self.split()
        last = self.probes[-1].rate
        if not (good and poor) and self._again(last, bool(good)):
            return last
        if not good:
            return self._lower(bool(poor))
        if not poor:
            return self._higher(max(good))
        if useless.count(CLIENT) == _MOST_REPEATS:
            return CLIENT_LIMIT
        if self.verdicts[-_MOST_DISTURBED:].count(DISTURBED) == _MOST_DISTURBED:
            return DISTURBANCE
        if min(poor) / max(good) > _NEAR:
            return float(np.sqrt(min(poor) * max(good)))
        return self._refined()

    def _said(self, rate: float) -> list[str]:
        return [said for probe, said in zip(self.probes, self.verdicts, strict=True) if probe.rate == rate]

    def _again(self, rate: float, held: bool) -> bool:
        """Return whether to repeat a rate that did not count: one hiccup of the client must not pass for its limit."""
        if self.verdicts[-1] == SETTLING:
            return not held
        # A lower rate, which disturbs the machine less, is tried before this one is tried often.
        return self._held_up(rate) and not self._given_up(rate) and (held or len(self._said(rate)) < _TRIES)

    def _held_up(self, rate: float) -> bool:
        """Return whether the client never got this rate out."""
        return set(self._said(rate)) <= {CLIENT, DISTURBED}

    def _given_up(self, rate: float) -> bool:
        """Return whether it was held up at a rate too often to try it again."""
        said = self._said(rate)
        return self._held_up(rate) and (said.count(CLIENT) >= _TRIES or len(said) >= _MOST_DISTURBED)

    def _lower(self, failed: bool) -> float | str:
        lower = min(probe.rate for probe in self.probes) / 2
        return lower if lower >= LOWEST else NONE_HOLDS if failed else CLIENT_LIMIT

    def _higher(self, held: float) -> float | str:
        limited = (probe.rate for probe in self.probes if self._given_up(probe.rate))
        ceiling = min((rate for rate in limited if rate > held), default=float("inf"))
        if ceiling / held < _CEILING:
            return CLIENT_LIMIT
        if held >= self.highest:
            return HIGHEST
        return min(2 * held, float(np.sqrt(held * ceiling)), self.highest)

    def _refined(self) -> float | str:
        found = self.found(NARROW)
        if self.near >= _FEWEST and (found.high - found.low) / 2 <= self.tolerance * found.rate:
            return NARROW
        if not self.near or self.verdicts[-1] not in USELESS:
            self.near += 1
        return min(found.rate * _OFFSETS[self.near % len(_OFFSETS)], self.highest)

    def found(self, stopped: str) -> Found:
        """Return the estimate from all probes that count."""
        good, poor = self.split()
        if not good:
            nothing = float("nan")
            return Found(nothing, 0.0, min(poor, default=nothing), stopped, self._blamed(), self.probes, self.verdicts)
        if not poor:
            return Found(max(good), max(good), float("inf"), stopped, None, self.probes, self.verdicts)
        edges = self._edges()
        binding = min(edges, key=lambda condition: edges[condition].at(0.5))
        return Found(*edge.first(list(edges.values()), LEVEL), stopped, binding, self.probes, self.verdicts)

    def _edges(self) -> dict[int, Edge]:
        """Return the edge of every condition that was seen to fail at all."""
        probes = self.counting()
        rates = edge.grid([probe.rate for probe in probes])
        counts = {at: [probe.counts(at) for probe in probes] for at in range(len(self.allowed))}
        failing = {at: rows for at, rows in counts.items() if not all(_holds(row, self.allowed[at]) for row in rows)}
        return {at: edge.edge(rows, self.allowed[at], rates) for at, rows in failing.items()}

    def _blamed(self) -> int | None:
        lowest = min(self.counting(), key=lambda probe: probe.rate, default=None)
        if lowest is None:
            return None
        failing = [at for at, row in enumerate(self._counts(lowest)) if not _holds(row, self.allowed[at])]
        return failing[-1] if failing else None


def _holds(counts: Counts, allowed: float) -> bool:
    # A probe in which no request was due says nothing, least of all that its rate holds.
    return bool(counts.counted.sum() > 0 and counts.bad.sum() <= allowed * counts.counted.sum())


def trend(latency: NDArray[np.float64]) -> float:
    """Return by what factor the latency changed over a probe, 1 where no trend is shown.

    Mann-Kendall's test over the stretches (Mann, "Nonparametric tests against trend", Econometrica 13, 1945). A trend
    must also be a large one, because neighbouring stretches of a busy queue are not quite independent.
    """
    known = latency[~np.isnan(latency)]
    if len(known) < edge.BLOCKS // 2 or np.ptp(known) == 0:
        return 1.0
    if kendalltau(np.arange(len(known)), known).pvalue > _TREND_CHANCE:
        return 1.0
    part = len(known) // 3
    factor = float(known[-part:].mean() / known[:part].mean())
    return factor if max(factor, 1 / factor) > _TREND_GROWTH else 1.0


def verdict(probe: Probe, allowed: Sequence[float]) -> str:
    """Return the verdict that a probe deserves, given the share of bad requests that each condition allows."""
    if probe.fault:
        return FAILED
    if probe.client:
        return DISTURBED if probe.idle else CLIENT
    if probe.growth != 1:
        return GROWING if probe.growth > 1 else SETTLING
    rows = [Counts(probe.rate, *row) for row in zip(probe.counted, probe.bad, strict=True)]
    verdicts = list(map(_decided, rows, allowed))
    return next((said for said in (FAILED, UNDECIDED) if said in verdicts), HELD)


def held_although_late(probes: Sequence[Probe], allowed: Sequence[float]) -> float:
    """Return the highest rate whose conditions are shown to hold with the client's own lateness in them; 0 if none.

    It is for conditions on the latency from the planned time, which that lateness only lengthens.
    """
    late = (probe for probe in probes if probe.client)
    held = [probe.rate for probe in late if verdict(replace(probe, client=""), allowed) == HELD]
    return max(held, default=0.0)


def _decided(counts: Counts, allowed: float) -> str:
    spread = edge.spread([counts])
    n, k = round(counts.counted.sum() / spread), round(counts.bad.sum() / spread)
    if not n:
        return UNDECIDED
    interval = binomtest(k, n).proportion_ci(LEVEL, "wilson")
    return HELD if interval.high < allowed else FAILED if interval.low > allowed else UNDECIDED
