"""Arrivals: when requests reach the balancer, as gaps between them."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.plan.data import trace
from modelathe.errors import BadInput, UsageError
from serve.planning.engines.calls import Whole
from serve.simulate.service import Seconds

_FIX = "write poisson, uniform or gamma:CV, as in gamma:2"
BURST = 2.0
"""The coefficient of variation of a burst's gaps: that of Poisson arrivals is 1."""


@dataclass(frozen=True)
class Arrivals:
    """How requests follow each other.

    Args:
        text: as the user wrote it.
        variation: standard deviation of the gaps over their mean, ≥ 0; 1 is Poisson.
        recorded: gaps of a trace in seconds, float64 [n], its mean rate 1; None for arrivals by chance.
        rate: requests per second of the trace.
    """

    text: str
    variation: float = 1.0
    recorded: Seconds | None = None
    rate: float | None = None

    def gaps(self, count: int, done: int, generator: np.random.Generator, share: float = 1.0) -> Seconds:
        """Return the next `count` gaps between the requests that a part of the fleet gets; their mean is 1.

        Args:
            count: how many.
            done: requests so far; a trace goes on behind them, and begins anew at its end.
            generator: of all that is drawn.
            share: of all requests that this part gets, each by chance; 1 is the whole.
        """
        if self.variation == 1 and self.recorded is None:
            return generator.standard_exponential(count)
        # Between two requests that this part gets lie those that others get.
        steps = generator.geometric(share, count) if share < 1 else np.ones(count, np.int64)
        if self.recorded is not None:
            times = self._times(done + np.append(0, np.cumsum(steps)))
            found: Seconds = (times[1:] - times[:-1]) * share
            return found
        if self.variation == 0:
            return np.multiply(steps, share, dtype=np.float64)
        shape = self.variation**-2
        return generator.standard_gamma(shape * steps) / shape * share

    def _times(self, request: Whole) -> Seconds:
        """Return when requests of the trace come, by their number from 0."""
        assert self.recorded is not None
        times = np.append(0.0, np.cumsum(self.recorded))
        rounds, place = np.divmod(request, len(self.recorded))
        found: Seconds = times[place] + rounds * times[-1]
        return found


POISSON = Arrivals("poisson")


def parse(text: str) -> Arrivals:
    """Return the arrivals that a text such as `gamma:2` names.

    Raises:
        UsageError: it names none.
    """
    if text == "poisson":
        return POISSON
    if text == "uniform":
        return Arrivals(text, 0.0)
    found = re.fullmatch(r"gamma:(\d+(?:\.\d+)?)", text)
    if not found or not 0.1 <= float(found[1]) <= 10:
        raise UsageError(f"--arrival {text!r} is none", fix=f"{_FIX}; CV is from 0.1 to 10")
    return Arrivals(text, float(found[1]))


def read(path: Path, least: int = 2) -> Arrivals:
    """Return the arrivals of a trace, as `loadtest run --trace` takes it.

    Args:
        path: the file.
        least: how many requests it takes to tell.

    Raises:
        BadInput: it is none, or holds too few requests, or those of one moment.
    """
    times = np.array(trace.read(path))
    least = max(least, 2)
    if len(times) < least or times[-1] <= 0:
        few = f"holds {len(times):,} request{'s' * (len(times) > 1)}, and {least:,} are needed to tell"
        raise BadInput(
            few if len(times) < least else "holds requests of one moment only",
            where=str(path),
            fix="record traffic of minutes, or say --rate and --arrival",
        )
    rate = len(times) / trace.length(times.tolist())
    gaps = np.diff(times, append=trace.length(times.tolist()))
    return Arrivals(path.name, float(gaps.std() / gaps.mean()), gaps * rate, rate)
