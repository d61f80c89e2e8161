"""Live: a short open-loop run of the load generator against one copy of a model."""

from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import numpy as np

from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import OK, read
from modelathe.errors import MachineError
from modelathe.tensors import TensorSpec
from serve.server.endpoint import Endpoint
from serve.simulate import arrivals
from serve.simulate.arrivals import Arrivals
from serve.simulate.service import Seconds

PAYLOADS = 16


@dataclass(frozen=True)
class Traffic:
    """When requests come, in the simulation and live alike.

    Args:
        rate: requests per second; of a trace its mean.
        arrival: in the words of `loadtest run --arrival`.
        trace: recorded traffic instead.
        seed: of the arrivals.
    """

    rate: float
    arrival: str = "poisson"
    trace: Path | None = None
    seed: int = 0

    def at(self, rate: float) -> "Traffic":
        """Return the same at another rate."""
        return replace(self, rate=rate)

    def simulated(self, seconds: float) -> Arrivals:
        """Return the arrivals of so many seconds."""
        if self.trace is None:
            return arrivals.scheduled(self.rate, seconds, self.seed, self.arrival)
        times = np.asarray(arrivals.recorded(self.trace).at)
        return Arrivals(times[times < seconds])

    def plan(self, url: str, seconds: float) -> Plan:
        """Return the same for the load generator."""
        if self.trace is not None:
            return Plan(url, seconds, trace=str(self.trace), seed=self.seed)
        return Plan(url, seconds, rate=self.rate, arrival=self.arrival, seed=self.seed)


@dataclass(frozen=True)
class Seen:
    """What a live run saw.

    Args:
        latencies: seconds of each request, float64 [n], infinite where it got no answer.
        calls: how many the server counted.
        rate: answers per second.
    """

    latencies: Seconds
    calls: int
    rate: float

    @property
    def failed(self) -> int:
        """How many requests got no answer."""
        return int(np.isinf(self.latencies).sum())

    def interval(self, percent: float) -> tuple[float, float]:
        """Return between which milliseconds the percentile lies, with 95 % confidence: by ranks."""
        count, share = len(self.latencies), percent / 100
        spread = 1.96 * sqrt(count * share * (1 - share))
        low, high = (min(count - 1, max(0, round(count * share + sign * spread))) for sign in (-1, 1))
        ordered = np.sort(self.latencies) * 1e3
        return float(ordered[low]), float(ordered[high])


@dataclass(frozen=True)
class Model:
    """A model that is loaded: where, its name there, its inputs, and the folder of results."""

    endpoint: Endpoint
    name: str
    inputs: list[TensorSpec]
    folder: Path

    def run(self, traffic: Traffic, seconds: float) -> Seen:
        """Send the load and return what came of it.

        Raises:
            MachineError: the run was cut short.
        """
        path = self.folder / f"{self.name}.jsonl"
        parts = [Part(self.name, payload.generate(self.inputs, PAYLOADS, traffic.seed))]
        drive.run(traffic.plan(self.endpoint.plain, seconds), parts, path)
        results = read(path)
        counts = (results.end or {}).get("server")
        if counts is None:
            raise MachineError(
                "the live run was cut short", where=str(path), fix="tune again; the server's log is there too"
            )
        answered = results.of(OK)
        took = np.where(answered, results.done - results.planned, np.inf)
        length = max(seconds, float(results.done[answered].max(initial=0.0)))
        return Seen(took, counts["execution_count"], float(answered.sum()) / length)
