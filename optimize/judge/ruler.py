"""Ruler: how many times faster than a baseline, from rounds in which one subject at a time is opened anew.

Of several models open at once one may stay slow for as long as they are open: their threads share the cores. So a
round visits every subject alone, in random order, and the baseline twice. The second visit is the A/A control: what the
ruler says of a subject against itself, which shows how far its other words may be trusted.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

CONTROL = "the baseline again"
"""The name of the baseline's second visit in a round."""
LIMIT = 0.97
"""A ratio that lies wholly below is slower, one wholly above is not slower; 3 % are not worth a refusal."""
LOOKS = (9, 15, 25, 42, 70, 120, 200)
"""After so many rounds it is judged whether they are enough."""
FEWEST = LOOKS[0]
"""With fewer rounds there is no interval at its level."""
ERROR = 0.05 / (len(LOOKS) + 1)
"""How often an interval may miss at one look; all looks and the end of the time together miss in 5 % at most."""
CLEAR, DECIDED = 1.05, 1.01
"""High over low of an interval that needs no more rounds: where it is told, and where it decides something."""
ABSURD = 4.0
"""A control whose interval is wider, high over low, could not tell half the speed from double."""

Verdict = Literal["not slower", "slower", "undecided"]
Visit = Callable[[str], Mapping[int, float]]
"""Opens the subject of a name alone, closes it, and returns the seconds of one call by batch size."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline; larger is better.

    Args:
        value: the middle of the rounds' ratios.
        low, high: 95 % interval.
        spread: between these lie nine of ten rounds' ratios.
    """

    value: float
    low: float
    high: float
    spread: tuple[float, float] = (math.nan, math.nan)

    def verdict(self, limit: float = LIMIT) -> Verdict:
        """Judge the whole interval; NaN decides nothing."""
        if self.low > limit:
            return "not slower"
        return "slower" if self.high < limit else "undecided"

    @property
    def senseless(self) -> bool:
        """Whether this, as an A/A control, shows that the machine measures nothing.

        The interval lies wholly more than 3 % off 1, so that the same subject counts as slower or faster than itself
        where a promise is judged, or it is too wide to tell half the speed from double.
        """
        return not (self.low <= 1 / LIMIT and self.high >= LIMIT and self.high <= ABSURD * self.low)

    def document(self) -> dict[str, Any]:
        """Return the JSON form; what is not known, such as an end of the interval, is null."""
        value, low, high, least, most = (
            number if math.isfinite(number) else None for number in (self.value, self.low, self.high, *self.spread)
        )
        return {"value": value, "low": low, "high": high, "spread": [least, most], "verdict": self.verdict()}

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Speeds:
    """What rounds of visits gave.

    Args:
        seconds: for one call, by subject and batch size: one figure for each round, subjects of one round side by side.
        baseline: the subject whose second visits stand under `CONTROL`.
        took: seconds that all rounds took.
    """

    seconds: Mapping[str, Mapping[int, Sequence[float]]]
    baseline: str = ""
    took: float = math.nan

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return min((len(rounds) for found in self.seconds.values() for rounds in found.values()), default=0)

    def latency_ms(self, name: str) -> dict[int, float]:
        """Return the median milliseconds for one call, by batch size."""
        return {batch: float(np.median(rounds)) * 1000 for batch, rounds in self.seconds[name].items()}

    def throughput(self, name: str) -> dict[int, float]:
        """Return samples a second, by batch size."""
        return {batch: batch / float(np.median(rounds)) for batch, rounds in self.seconds[name].items()}

    def ratios(self, name: str, baseline: str) -> dict[int, Ratio]:
        """Return how many times faster than the subject `baseline` the subject `name` is, by batch size.

        Ratios are taken within each round, where both ran under the same conditions. The value is the median of the
        means of any two of their logarithms, the interval that of Wilcoxon's signed-rank test (Hodges and Lehmann,
        "Estimates of location based on rank tests", 1963): it needs no distribution, only that luck is as likely for
        one subject as for the other. It is made for every look at the rounds at once (Bonferroni), so that it holds
        whenever the rounds ended. Fewer than nine rounds know nothing: the interval is [0, ∞].
        """
        return {
            batch: _ratio(np.asarray(self.seconds[baseline][batch]) / np.asarray(rounds))
            for batch, rounds in self.seconds[name].items()
        }

    def control(self) -> dict[int, Ratio]:
        """Return what the ruler says of the baseline against itself, by batch size: 1 where it measures well."""
        return self.ratios(CONTROL, self.baseline)


@dataclass(frozen=True)
class Until:
    """When rounds have said enough: at a look where each ratio is clear, its interval beside `limit` or narrow.

    After `seconds` only those that decide something are waited for, unless one of them is slower already, and after
    `patience` more seconds nothing is; nine rounds there are always, unless `rounds` says fewer.

    Args:
        pairs: the ratios that are to be clear, as subject and the one that it is compared with; each against the
            baseline unless given.
        decide: subjects whose ratio to the baseline decides something, so that patience pays.
        limit: what a ratio is to be clear of.
        rounds: how many at most.
        seconds: for clear ratios.
        patience: so many seconds more for those in `decide`.
    """

    pairs: Sequence[tuple[str, str]] = ()
    decide: Sequence[str] = ()
    limit: float = LIMIT
    rounds: int = LOOKS[-1]
    seconds: float = 20.0
    patience: float = 100.0


def alternate(
    visit: Visit,
    names: Sequence[str],
    *,
    baseline: str,
    until: Until = Until(),
    clock: Callable[[], float] = time.perf_counter,
) -> Speeds:
    """Visit every subject once in each round, and the baseline twice, until the rounds say enough.

    Args:
        visit: opens one subject, alone, and times it.
        names: of the subjects.
        baseline: one of them.
        until: when the rounds have said enough.
        clock: tells the seconds.
    """
    rng = np.random.default_rng(0)
    everyone = [*names, CONTROL]
    wanted = list(until.pairs) or [(name, baseline) for name in names if name != baseline]
    decisive = [(name, baseline) for name in until.decide]
    taken: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in everyone}
    begun = clock()
    for number in range(1, until.rounds + 1):
        for index in rng.permutation(len(everyone)):
            name = everyone[index]
            for batch, value in visit(baseline if name == CONTROL else name).items():
                taken[name][batch].append(value)
        passed = clock() - begun
        if number >= FEWEST and passed > until.seconds + until.patience * bool(decisive):
            break
        if number in LOOKS:
            speeds = Speeds(taken, baseline)
            told = passed > until.seconds or _clear(speeds, wanted, until.limit, CLEAR)
            if told and (_clear(speeds, decisive, until.limit, DECIDED) or _slower(speeds, decisive, until.limit)):
                break
    return Speeds(taken, baseline, clock() - begun)


def more_seconds(ratio: Ratio, speeds: Speeds, limit: float = LIMIT) -> float:
    """Return about how much longer it would have to be measured here until `ratio` is decided.

    The width of an interval falls with the root of the rounds; infinite where the value is the limit itself.
    """
    half = math.log(ratio.high / ratio.low) / 2 if 0 < ratio.low <= ratio.high < math.inf else math.inf
    distance = abs(math.log(ratio.value / limit)) if ratio.value > 0 else 0.0
    return speeds.took * ((half / distance) ** 2 - 1) if distance and math.isfinite(half) else math.inf


def _clear(speeds: Speeds, pairs: Sequence[tuple[str, str]], limit: float, near: float) -> bool:
    """Return whether every ratio lies beside `limit` or its ends are `near`, and the control makes sense."""
    if any(ratio.senseless for ratio in speeds.control().values()):
        return False
    ratios = [ratio for name, against in pairs for ratio in speeds.ratios(name, against).values()]
    return all(ratio.verdict(limit) != "undecided" or ratio.high <= near * ratio.low for ratio in ratios)


def _slower(speeds: Speeds, pairs: Sequence[tuple[str, str]], limit: float) -> bool:
    """Return whether a ratio lies below `limit`, which none at another batch size mends, with a control of sense."""
    if any(ratio.senseless for ratio in speeds.control().values()):
        return False
    ratios = [ratio for name, against in pairs for ratio in speeds.ratios(name, against).values()]
    return any(ratio.verdict(limit) == "slower" for ratio in ratios)


def _ratio(ratios: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> Ratio:
    """Return the Hodges-Lehmann estimate of the rounds' ratios with its interval, both on logarithms."""
    logs = np.log(ratios)
    if not np.isfinite(logs).all():
        return Ratio(math.nan, math.nan, math.nan)
    first, second = np.triu_indices(len(logs))
    means = np.exp(np.sort((logs[first] + logs[second]) / 2))
    spread = (float(np.quantile(ratios, 0.05)), float(np.quantile(ratios, 0.95)))
    rank = _rank(len(logs))
    low, high = (float(means[rank - 1]), float(means[-rank])) if rank else (0.0, math.inf)
    return Ratio(float(np.median(means)), low, high, spread)


@lru_cache
def _rank(count: int) -> int:
    """Return which mean of two, counted from either end, bounds the interval; 0 where there are too few for one.

    It is the largest rank whose signed-rank statistic is smaller, under the null, in half of `ERROR` of all cases.
    """
    chances = np.ones(1)
    for rank in range(1, count + 1):
        larger = np.zeros(len(chances) + rank)
        larger[: len(chances)] += chances / 2
        larger[rank:] += chances / 2
        chances = larger
    return int(np.searchsorted(np.cumsum(chances), ERROR / 2, side="right"))
