"""Live: short runs of the load generator against one copy of a model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.load import drive
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import OK, Results, read
from modelathe.errors import MachineError
from modelathe.tensors import TensorSpec
from serve.server.endpoint import Endpoint
from serve.simulate import arrivals
from serve.simulate.arrivals import Arrivals
from serve.simulate.service import Seconds
from serve.tuning import cores
from serve.tuning.cores import Used, Watch

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

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "trace": self.trace and str(self.trace)}


@dataclass(frozen=True)
class Seen:
    """What a live run saw.

    Args:
        latencies: seconds of each request, float64 [n], infinite where it got no answer.
        calls: how many the server counted.
        rate: answers per second.
        queue: mean seconds that a request waited in the server.
        call: mean seconds of its call.
        used: the cores meanwhile.
    """

    latencies: Seconds
    calls: int
    rate: float
    queue: float
    call: float
    used: Used

    @property
    def failed(self) -> int:
        """How many requests got no answer."""
        return int(np.isinf(self.latencies).sum())

    @property
    def answered(self) -> Seconds:
        """Seconds of each request that got an answer, float64 [n]."""
        return self.latencies[np.isfinite(self.latencies)]

    def interval(self, percent: float) -> tuple[float, float]:
        """Return between which milliseconds the percentile lies, with 95 % confidence: by ranks."""
        count, share = len(self.latencies), percent / 100
        spread = 1.96 * sqrt(count * share * (1 - share))
        low, high = (min(count - 1, max(0, round(count * share + sign * spread))) for sign in (-1, 1))
        ordered = np.sort(self.latencies) * 1e3
        return float(ordered[low]), float(ordered[high])

    def document(self) -> dict[str, Any]:
        """Return the JSON form; a request without an answer is null."""
        latencies = [None if lost else round(one, 6) for one, lost in zip(*self._told(), strict=True)]
        return {**asdict(self), "latencies": latencies}

    def _told(self) -> tuple[list[float], list[bool]]:
        return self.latencies.tolist(), np.isinf(self.latencies).tolist()

    @staticmethod
    def of(document: Mapping[str, Any]) -> "Seen":
        """Return what a JSON form states."""
        latencies = np.array([np.inf if one is None else one for one in document["latencies"]], np.float64)
        return Seen(**{**document, "latencies": latencies, "used": Used(**document["used"])})


@dataclass(frozen=True)
class Model:
    """A model that is loaded: where, its name there, its inputs, and the folder of results."""

    endpoint: Endpoint
    name: str
    inputs: list[TensorSpec]
    folder: Path

    def run(self, traffic: Traffic, seconds: float) -> Seen:
        """Send the load in an open loop and return what came of it.

        Raises:
            MachineError: the run was cut short, or other programs used the cores.
        """
        return self._run(traffic.plan(self.endpoint.plain, seconds), traffic.seed)

    def pressed(self, clients: int, seconds: float) -> Seen:
        """Send as much as so many clients get answered that wait for nothing else, and return what came of it.

        Raises:
            MachineError: as `run`.
        """
        return self._run(Plan(self.endpoint.plain, seconds, concurrency=clients, warmup=0.0), 0)

    def _run(self, plan: Plan, seed: int) -> Seen:
        path = self.folder / f"{self.name}.jsonl"
        parts = [Part(self.name, payload.generate(self.inputs, PAYLOADS, seed))]
        watch = Watch(self.endpoint.pid)
        drive.run(plan, parts, path)
        used = watch.used()
        results = read(path)
        counts = (results.end or {}).get("server")
        if counts is None:
            raise MachineError(
                "the live run was cut short", where=str(path), fix="tune again; the server's log is there too"
            )
        cores.check(used, "during a live run")
        return _seen(results, counts, plan, used)


def _seen(results: Results, counts: Mapping[str, Any], plan: Plan, used: Used) -> Seen:
    answered = results.of(OK)
    since = results.planned if plan.open else results.sent
    took = np.where(answered, results.done - since, np.inf)
    length = max(plan.duration, float(results.done[answered].max(initial=0.0)))
    each = max(1, counts["success"]) * 1e9
    call = sum(counts[f"compute_{part}_ns"] for part in ("input", "infer", "output")) / each
    return Seen(took, counts["execution_count"], float(answered.sum()) / length, counts["queue_ns"] / each, call, used)
