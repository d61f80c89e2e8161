"""Schedule: when each request of an open-loop run is due.

Two parts make a schedule, both pure: an *arrival* says how requests follow each other (equally spaced, by chance, in
bursts) and a *profile* says which rate holds at which time. No clock is read here. A new shape is a new function and a
row in `ARRIVALS` or `PROFILES`; its keyword-only arguments are what a user may write behind its name, as in
`gamma:burstiness=0.5` or `ramp:to=500`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelathe.errors import UsageError

Numbers = NDArray[np.float64]
_BLOCK = 1024
_STEPS = 200_000

FASTEST = 100_000.0
"""Requests a second that may be asked of one worker; beyond what it sends, a run would be a list of dropped ones."""
MOST_IN_FLIGHT = 1000
"""Requests in flight at once, at most, for one worker."""


def constant(seed: int = 0) -> Iterator[Numbers]:
    """Yield the arrivals 0, 1, 2, ... in blocks."""
    # Products, not sums: rounding must not add up over a long run.
    return (np.arange(start, start + _BLOCK, dtype=np.float64) for start in count(0, _BLOCK))


def poisson(seed: int = 0) -> Iterator[Numbers]:
    """Yield the arrivals of many independent users, one per unit of time on average: exponential gaps."""
    return _summed(np.random.default_rng(seed).standard_exponential)


def gamma(seed: int = 0, *, burstiness: float = 0.25) -> Iterator[Numbers]:
    """Yield arrivals with gaps of a gamma distribution, one per unit of time on average.

    Args:
        seed: equal seeds give equal arrivals.
        burstiness: the shape of the distribution: below 1 the arrivals come in bursts, 1 is `poisson`, above 1 they are
            more even.
    """
    rng = np.random.default_rng(seed)
    return _summed(lambda size: rng.standard_gamma(burstiness, size) / burstiness)


def _summed(draw: Callable[[int], Numbers]) -> Iterator[Numbers]:
    last = 0.0
    while True:
        block = last + np.cumsum(draw(_BLOCK))
        last = float(block[-1])
        yield block


def flat(at: Numbers, rate: float, duration: float) -> Numbers:
    """Return the same rate for all times."""
    return np.full_like(at, rate)


def ramp(at: Numbers, rate: float, duration: float, *, to: float) -> Numbers:
    """Go from `rate` to the rate `to` in a straight line."""
    return rate + (to - rate) * at / duration


def step(at: Numbers, rate: float, duration: float, *, to: float, steps: float = 5) -> Numbers:
    """Go from `rate` to the rate `to` in `steps` levels of equal length, the first and the last being these two."""
    level = np.minimum(np.floor(at / duration * steps), steps - 1)
    return rate + (to - rate) * level / max(steps - 1, 1)


def spike(at: Numbers, rate: float, duration: float, *, to: float, start: float = 0.4, length: float = 0.2) -> Numbers:
    """Hold `rate` but for one stretch at the rate `to`; `start` and `length` are shares of the duration."""
    inside = (at >= start * duration) & (at < (start + length) * duration)
    return np.where(inside, to, rate)


def sine(at: Numbers, rate: float, duration: float, *, swing: float = 0.5, period: float = 0.0) -> Numbers:
    """Swing around `rate` by the share `swing` of it, with a period in seconds; 0 takes the duration."""
    return rate * (1 + swing * np.sin(2 * np.pi * at / (period or duration)))


ARRIVALS: dict[str, Callable[..., Iterator[Numbers]]] = {"constant": constant, "poisson": poisson, "gamma": gamma}
PROFILES: dict[str, Callable[..., Numbers]] = {"flat": flat, "ramp": ramp, "step": step, "spike": spike, "sine": sine}


def times(
    rate: float, duration: float, seed: int = 0, arrival: str = "constant", profile: str = "flat"
) -> Iterator[float]:
    """Yield send times in seconds after the start, ascending and below `duration`.

    Args:
        rate: requests per second; of a profile that changes, the rate that it begins with or swings around.
        duration: seconds.
        seed: of the arrivals.
        arrival: a name in `ARRIVALS`, with its settings as in `gamma:burstiness=0.5`.
        profile: a name in `PROFILES`, likewise.

    Raises:
        UsageError: no such name or setting, a setting without sense, or a rate below 0 or above `FASTEST`.
    """
    units, due = chosen("arrival", arrival)(seed), _inverse(rate, duration, chosen("profile", profile))
    for block in units:
        for at in due(block).tolist():
            if not at < duration:
                return
            yield at


def mean_rate(rate: float, duration: float, profile: str = "flat") -> float:
    """Return the requests per second that a profile asks for on average."""
    if profile == "flat":
        return rate
    return float(chosen("profile", profile)(np.linspace(0, duration, _STEPS), rate, duration).mean())


def _inverse(rate: float, duration: float, profile: Callable[..., Numbers]) -> Callable[[Numbers], Numbers]:
    """Return the function from a count of requests to the time at which a profile has asked for so many."""
    if profile is flat:
        _check_rates(np.array([rate]))
        return lambda units: units / rate
    # Rates in the middle of many short stretches, summed: exact for straight lines, and for steps to within a stretch.
    edges = np.linspace(0, duration, _STEPS + 1)
    rates = profile((edges[1:] + edges[:-1]) / 2, rate, duration)
    _check_rates(rates)
    asked = np.concatenate([[0.0], np.cumsum(rates) * duration / _STEPS])
    return lambda units: np.interp(units, asked, edges, right=np.inf)


def _check_rates(rates: Numbers) -> None:
    low, high = float(rates.min()), float(rates.max())
    if not low >= 0 or not 0 < high <= FASTEST:
        raise UsageError(
            f"the rate goes from {low:g} to {high:g} requests a second",
            fix=f"stay between 0 and {FASTEST:g}; split larger loads",
        )


def chosen(kind: str, text: str) -> Callable[..., Any]:
    """Return the function that `NAME` or `NAME:SETTING=NUMBER,...` names, with its settings filled in.

    Args:
        kind: `arrival` or `profile`.
        text: what the user wrote.

    Raises:
        UsageError: there is no such name or setting, or a number is missing or not one.
    """
    table: Mapping[str, Callable[..., Any]] = ARRIVALS if kind == "arrival" else PROFILES
    name, _, rest = text.partition(":")
    if name not in table:
        raise UsageError(f"no {kind} is called {name!r}", fix=f"use one of {', '.join(table)}")
    known = {
        key: value
        for key, value in inspect.signature(table[name]).parameters.items()
        if value.kind is value.KEYWORD_ONLY
    }
    settings: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        settings[key.strip()] = _number(kind, name, key.strip(), value, list(known))
    missing = [key for key, value in known.items() if value.default is value.empty and key not in settings]
    if missing:
        raise UsageError(f"the {kind} {name} needs {', '.join(missing)}", fix=f"write {name}:{missing[0]}=NUMBER")
    return partial(table[name], **settings) if settings else table[name]


def _number(kind: str, name: str, key: str, value: str, known: list[str]) -> float:
    if key not in known:
        has = ", ".join(known) or "none"
        raise UsageError(f"the {kind} {name} has no setting {key!r}", fix=f"its settings: {has}")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf") or (number == 0 and key in ("burstiness", "steps")):
        raise UsageError(f"{key} of the {kind} {name} is {value!r}", fix="give a number above 0")
    return number
