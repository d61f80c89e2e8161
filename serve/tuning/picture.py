"""Picture: what the page shows beside the live runs, from the simulation that they have corrected."""

from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from serve.simulate.configuration import Configuration
from serve.tuning import grid
from serve.tuning.confirm import Confirmed
from serve.tuning.grid import Space

RATES, GROWING, BEYOND = 16, 20.0, 4.0
"""Rates of a curve of latency; how many times the objective's time, and the rate that is asked for, end it."""


def pictures(space: Space, today: Confirmed, shown: Confirmed) -> dict[str, Any]:
    """Return latency over rate of both, what each knob would have done to the second, and where the time goes."""
    both = [today] if shown is today else [today, shown]
    return {
        "rates": {one.name: list(_rates(space, one.predicted.configuration)) for one in both},
        "knobs": _knobs(space, shown),
        "spent": [_spent(space, one) for one in both],
    }


def _rates(space: Space, configuration: Configuration) -> Iterator[dict[str, Any]]:
    """Yield what is predicted from a low rate to the highest, up to where queues only grow."""
    name, limit = grid.percentile(space.objective), GROWING * space.objective.longest * 1e3
    most = min(space.most(configuration), BEYOND * space.traffic.rate)
    for share in np.linspace(1 / RATES, 1.0, RATES):
        found = space.outcome(configuration, float(share) * most)
        if limit and found.latency_ms[name] > limit:
            return
        yield {"rate": found.rate, "latency_ms": found.latency_ms, "holds": found.holds}


def _knobs(space: Space, shown: Confirmed) -> dict[str, list[dict[str, Any]]]:
    """Return what is predicted where one knob stands elsewhere and the others as in the configuration that is shown."""
    now, rate = shown.predicted.configuration, shown.predicted.rate
    every = list(space.configurations())
    found = {}
    for knob in ("threads", "instances", "max_batch", "delay"):
        near = [one for one in every if replace(one, **{knob: getattr(now, knob)}) == now]
        turned = sorted({*near, now}, key=attrgetter(knob))
        found["delay_us" if knob == "delay" else knob] = [space.outcome(one, rate).document() for one in turned]
    return found


def _spent(space: Space, one: Confirmed) -> dict[str, Any]:
    """Return where the time of a request goes, on average: as the server counted it, and as the simulation has it."""
    seen, asked = one.tried.seen, one.tried
    whole = float(seen.answered.mean()) if len(seen.answered) else float("nan")
    outside = max(0.0, whole - seen.queue - seen.call)
    return {
        "name": one.name,
        "predicted": space.spent(one.predicted.configuration, one.predicted.rate, asked.seconds),
        "measured": {"queue": seen.queue * 1e3, "call": seen.call * 1e3, "outside": outside * 1e3},
    }
