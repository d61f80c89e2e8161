"""Known: what is known of a model on this machine: times of calls, what server and client add, and live runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from serve.planning.engines.calls import largest_batch
from serve.simulate.configuration import Configuration
from serve.simulate.fitting import Run, fitted
from serve.simulate.service import Curve, Seconds
from serve.tuning.live import Seen, Traffic

HALF = 0.5
"""The share of the highest rate below which a run tells what server and client add; above it, what they take."""
STEPS = 12
"""Halvings of what a request takes of the cores."""


@dataclass(frozen=True)
class Tried:
    """A live run of a configuration.

    Args:
        configuration: that one.
        traffic: what was sent.
        seconds: for how long.
        seen: what came of it.
    """

    configuration: Configuration
    traffic: Traffic
    seconds: float
    seen: Seen

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        stated = {"configuration": asdict(self.configuration), "traffic": self.traffic.document()}
        return {**stated, "seconds": self.seconds, "seen": self.seen.document()}

    @staticmethod
    def of(document: Mapping[str, Any]) -> "Tried":
        """Return what a JSON form states."""
        configuration = TypeAdapter(Configuration).validate_python(document["configuration"])
        traffic = TypeAdapter(Traffic).validate_python(document["traffic"])
        return Tried(configuration, traffic, document["seconds"], Seen.of(document["seen"]))

    def run(self) -> Run:
        """Return it as what a simulation is fitted to."""
        return Run(self.traffic.simulated(self.seconds), self.configuration, self.seen.calls, self.seen.answered)


@dataclass(frozen=True)
class Known:
    """What is known of a model on this machine.

    Args:
        cores: how many the server, and whoever asks it, may use.
        curves: the times of a call by number of threads.
        request: seconds of a core that server and client spend on each request, its share of a call apart.
        first: the live run that the overheads were fitted to; None where there was none yet.
        live: runs of configurations since.
    """

    cores: int
    curves: Mapping[int, Curve] = field(default_factory=dict)
    request: float = 0.0
    first: Tried | None = None
    live: tuple[Tried, ...] = ()

    def curve(self, threads: int) -> Curve:
        """Return the times with a number of threads, or with the nearest that was measured."""
        return self.curves[min(self.curves, key=lambda number: abs(number - threads))]

    def ceiling(self, configuration: Configuration, request: float | None = None) -> float:
        """Return the requests per second beyond which a configuration, its server and the client want more cores.

        The client that sends the load runs on the same cores, so that its share is in it.
        """
        calls = self.curve(configuration.threads).calls
        sizes = [size for size in calls if size <= largest_batch(configuration)] or [min(calls)]
        call = min(float(calls[size].mean()) / size for size in sizes) * configuration.threads
        return self.cores / (call + (self.request if request is None else request))

    def settled(self) -> "Known":
        """Return the same once a tuning has ended: the next one makes live runs of its own."""
        return replace(self, live=())

    def fitted(self) -> "Known":
        """Return the same with what all live runs say of server and client."""
        runs = [*([self.first] if self.first else []), *self.live]
        calm = [one for one in runs if one is self.first or one.seen.rate < HALF * self.ceiling(one.configuration)]
        if not calm:
            return self
        whole = fitted_to(self, calm)
        curves = {}
        for threads, curve in self.curves.items():
            own = [one for one in calm if one.configuration.threads == threads]
            fit = fitted_to(self, own) if own else whole
            curves[threads] = replace(curve, inside=fit.inside, outside=fit.outside, spread=fit.spread)
        return replace(self, curves=curves)


def fitted_to(known: Known, tried: Sequence[Tried]) -> Curve:
    """Return the overheads that these runs have in common, in a curve whose times are those of the first one."""
    return fitted(known.curve(tried[0].configuration.threads), [one.run() for one in tried])


def queued(at: Seconds, each: float) -> Seconds:
    """Return when requests are through that are let through one after the other, `each` seconds apart at the least."""
    place = np.arange(len(at)) * each
    found: Seconds = np.maximum.accumulate(at - place) + place
    return found


def pressing(low: float, high: float, late: Callable[[float], float], wanted: float) -> float:
    """Return what a request takes of the cores, between two values, with which latency is as wanted."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if late(middle) < wanted else (low, middle)
    return (low + high) / 2
