"""Fitting: the two overheads of server and client, from one live run whose arrivals can be simulated."""

from dataclasses import replace

from serve.simulate.arrivals import Arrivals, Clients
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate

STEPS = 12
"""Halvings; what is left of the longest call that was measured is less than a thousandth."""


def fitted(curve: Curve, load: Arrivals | Clients, configuration: Configuration, calls: int, p50: float) -> Curve:
    """Return the curve with the overheads with which the simulation makes as many calls, with the same median.

    The number of calls tells what a call takes longer, so the instance should be busy: more than half a request should
    come during a call, and the dynamic batcher form batches of any size.

    Args:
        curve: the times of calls.
        load: what was sent.
        configuration: of the model that was asked.
        calls: how many calls the server counted.
        p50: the median of the latencies that the client saw, in seconds.
    """
    low, high = 0.0, max(float(times.max()) for times in curve.calls.values())
    for _ in range(STEPS):
        inside = (low + high) / 2
        made = simulate(load, replace(curve, inside=inside, outside=0.0), configuration)
        low, high = (inside, high) if made.batches.size > calls else (low, inside)
    curve = replace(curve, inside=low, outside=0.0)
    return replace(curve, outside=max(0.0, p50 - simulate(load, curve, configuration).quantile(0.5)))
