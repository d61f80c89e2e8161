"""Fitting: what server and client add, from live runs whose arrivals can be simulated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from serve.simulate.arrivals import Arrivals, Clients
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve, Seconds
from serve.simulate.simulation import simulate

STEPS = 12
"""Halvings; what is left of the longest call that was measured is less than a thousandth."""
SEEDS = range(3)
"""Of the simulations that what was seen is compared with."""
LEVELS, TIMES, DRAWN, FEWEST, SURE = 60, 40, 1000, 3, 10
"""Shares of requests at which both are compared, the smallest that of `FEWEST` requests; times that may be added, half
as many; how many are kept to be drawn; and the weight of all shares being 1 beside all others."""


@dataclass(frozen=True)
class Run:
    """A live run.

    Args:
        load: what was sent.
        configuration: of the model that was asked.
        calls: how many calls the server counted.
        latencies: seconds of each answer as the client saw them, float64 [n], n ≥ 1.
    """

    load: Arrivals | Clients
    configuration: Configuration
    calls: int
    latencies: Seconds


def fitted(curve: Curve, runs: Sequence[Run]) -> Curve:
    """Return the curve with the overheads with which the simulation makes as many calls, and latencies like those seen.

    The number of calls tells what a call takes longer, so the instance should be busy: more than half a request should
    come during a call, and the dynamic batcher form batches of any size. What is left of the latencies is what server
    and client add to each request.

    Args:
        curve: the times of calls.
        runs: at least one.
    """
    bare = replace(curve, outside=0.0, spread=np.zeros(1))
    calls = sum(run.calls for run in runs)
    low, high = 0.0, max(float(times.max()) for times in curve.calls.values())
    for _ in range(STEPS):
        inside = (low + high) / 2
        tried = replace(bare, inside=inside)
        made = sum(simulate(run.load, tried, run.configuration).batches.size for run in runs)
        low, high = (inside, high) if made > calls else (low, inside)
    found = replace(bare, inside=low)
    pairs = [(run.latencies, _simulated(run, found)) for run in runs]
    beside = added(pairs)
    outside = float(np.median(beside))
    return replace(found, outside=outside, spread=beside - outside)


def _simulated(run: Run, curve: Curve) -> Seconds:
    made = [simulate(run.load, curve, run.configuration, seed=seed).latencies for seed in SEEDS]
    return np.sort(np.concatenate(made))


def added(pairs: Sequence[tuple[Seconds, Seconds]]) -> Seconds:
    """Return seconds, float64 [DRAWN], which added by chance to times within the server give those seen.

    The two are not subtracted request by request: a call's own luck would be counted twice. Wanted are shares of some
    times, none below 0, with which the share of requests that take longer than t is as seen, for many t, each weighed
    by how well so many requests tell it.

    Args:
        pairs: seconds seen, and seconds within the server, ascending; at least one of each.
    """
    times = _candidates(pairs)
    rows, wanted = [], []
    for seen, within in pairs:
        shares = np.geomspace(0.98, max(FEWEST / len(seen), 1e-4), LEVELS)
        limits = np.quantile(seen, 1 - shares)
        above = (seen[None, :] > limits[:, None]).mean(axis=1)
        later = 1 - np.searchsorted(within, limits[:, None] - times[None, :], side="right") / len(within)
        sure = 1 / np.sqrt(np.maximum(above * (1 - above), FEWEST / len(seen)) / len(seen))
        rows.append(later * sure[:, None])
        wanted.append(above * sure)
    # The shares of all times are 1 in all.
    whole = SURE * float(np.concatenate(wanted).sum())
    rows.append(np.full((1, len(times)), whole))
    wanted.append(np.full(1, whole))
    weights, _ = nnls(np.concatenate(rows), np.concatenate(wanted))
    upto = np.cumsum(weights / weights.sum())
    middles = (np.arange(DRAWN) + 0.5) / DRAWN
    drawn: Seconds = times[np.minimum(np.searchsorted(upto, middles), len(times) - 1)]
    return drawn


def _candidates(pairs: Sequence[tuple[Seconds, Seconds]]) -> Seconds:
    """Return the times that may be added: close to each other around the difference of the medians, and up to all."""
    usual = max(0.0, max(float(np.median(seen) - np.median(within)) for seen, within in pairs))
    longest = max(float(seen.max()) for seen, _ in pairs)
    tail = usual + np.geomspace(max(longest / 1000, 1e-6), max(longest, 1e-5), TIMES)
    return np.concatenate([np.linspace(0.0, usual, TIMES), tail]) if usual else np.append(0.0, tail)
