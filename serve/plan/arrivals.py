"""Arrivals: when requests reach the balancer, as gaps between them."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtest.plan.data import trace
from modelathe.errors import BadInput, UsageError
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

    def gaps(self, count: int, done: int, generator: np.random.Generator) -> Seconds:
        """Return the next `count` gaps, one per unit of time on average, after `done` of them. A trace begins anew."""
        if self.recorded is not None:
            return self.recorded[np.arange(done, done + count) % len(self.recorded)]
        if self.variation == 0:
            return np.ones(count)
        if self.variation == 1:
            return generator.standard_exponential(count)
        shape = self.variation**-2
        return generator.standard_gamma(shape, count) / shape


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
