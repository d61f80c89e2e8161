"""Exact: replicas one after the other as Triton's scheduler does it, with delays, preferred sizes and queue limits."""

from dataclasses import dataclass

import numpy as np

from serve.planning.engines.calls import Whole
from serve.simulate.arrivals import Arrivals
from serve.simulate.configuration import Configuration
from serve.simulate.result import ANSWERED
from serve.simulate.service import Curve, Seconds
from serve.simulate.simulation import simulate


@dataclass
class Replicas:
    """Replicas of one model; what they did is added up.

    Args:
        curve: the times of a call.
        configuration: of the model.
        seed: of the first replica's calls, the next ones' are those behind it.
    """

    curve: Curve
    configuration: Configuration
    seed: int
    batches: int = 0
    requests: int = 0
    busy: float = 0.0

    def run(self, at: Seconds, replica: Whole) -> Seconds:
        """Return the latency of each request, float64 [n]; infinite where it was refused, or waited too long.

        Args:
            at: times of arrival, float64 [n], ascending.
            replica: where each goes, int64 [n].
        """
        latency = np.full(len(at), np.inf)
        for number in np.unique(replica).tolist():
            mine = np.flatnonzero(replica == number)
            made = simulate(Arrivals(at[mine]), self.curve, self.configuration, seed=self.seed + number)
            latency[mine[made.requests["outcome"] == ANSWERED]] = made.latencies
            self.batches += len(made.batches)
            self.requests += int(made.batches["requests"].sum())
            self.busy += float((made.batches["end"] - made.batches["start"]).sum())
        return latency
