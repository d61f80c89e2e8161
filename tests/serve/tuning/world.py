"""A world in which the truth is known: a server that is a simulation, with what it adds and takes chosen by a test."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serve.planning import served
from serve.planning.objective import parse
from serve.simulate import fitting
from serve.simulate.configuration import Configuration
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate
from serve.tuning import confirm, grid, known, live, measure, measuring, trial
from serve.tuning.cores import Used
from serve.tuning.known import Known
from serve.tuning.live import Model, Seen, Traffic
from serve.tuning.trial import Subject
from serve.tuning.tune import Wanted
from tests.serve.planning.curves import drawn

LUCK = 77
SLOWER, CORES = 3.0, 2


def scaled(curve: Curve, times: float) -> Curve:
    return replace(curve, calls={size: seconds * times for size, seconds in curve.calls.items()})


def curves() -> dict[int, Curve]:
    """Return times of calls: with one thread three times those with two."""
    together = drawn(together=(1.0, 1.0))
    return {1: scaled(together, SLOWER), 2: together}


@dataclass
class World:
    """What is true of the server.

    Args:
        inside: seconds that it adds to each call.
        outside: seconds that it and the client add to each request.
        odd: how many times longer calls take live than they were measured, by threads and instances.
        request: seconds of a core for each request.
        cut: the live runs that end well; the next one is interrupted.
    """

    inside: float = 0.0003
    outside: float = 0.0008
    odd: Mapping[tuple[int, int], float] = field(default_factory=dict)
    request: float = 0.00005
    cut: int = 99
    configs: dict[str, Configuration] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)

    def truth(self, configuration: Configuration) -> Curve:
        times = self.odd.get((configuration.threads, configuration.instances), 1.0)
        return replace(scaled(curves()[configuration.threads], times), inside=self.inside, outside=self.outside)

    @contextmanager
    def served(self, _: Subject, configs: Mapping[str, ModelConfig], __: Path) -> Iterator[Any]:
        self.configs = {name: served.configuration(config) for name, config in configs.items()}
        yield SimpleNamespace(plain="", pid=os.getpid())

    def run(self, model: Model, traffic: Traffic, seconds: float) -> Seen:
        if len(self.runs) >= self.cut:
            raise KeyboardInterrupt
        self.runs.append(model.name)
        configuration = self.configs[model.name]
        at = np.asarray(traffic.simulated(seconds).at)
        return self._seen(configuration, at, seconds)

    def pressed(self, model: Model, clients: int, seconds: float) -> Seen:
        configuration = self.configs[model.name]
        rate = Known(CORES, curves(), self.request).ceiling(configuration)
        seen = self._seen(configuration, np.arange(int(rate * seconds)) / rate, seconds)
        return replace(seen, used=Used(float(CORES), 0.0, seconds))

    def _seen(self, configuration: Configuration, at: np.ndarray, seconds: float) -> Seen:
        received = known.queued(at, 1 / Known(CORES, curves(), self.request).ceiling(configuration))
        made = simulate(live.Arrivals(received), self.truth(configuration), configuration, seed=LUCK)
        took = made.latencies + received - at
        call = float((made.batches["end"] - made.batches["start"]).mean())
        used = Used(1.0, 0.0, seconds)
        return Seen(took, made.batches.size, len(at) / seconds, float(took.mean()) - call - self.outside, call, used)


def installed(monkeypatch: pytest.MonkeyPatch, world: World) -> World:
    """Let `serve tune` live in that world, with short simulations."""
    monkeypatch.setattr(grid, "REQUESTS", 300)
    monkeypatch.setattr(measuring, "largest", lambda _: 8)
    monkeypatch.setattr(measuring, "FIT_SECONDS", 3.0)
    monkeypatch.setattr(fitting, "STEPS", 8)
    monkeypatch.setattr(known, "STEPS", 8)
    monkeypatch.setattr(grid, "DELAYS", (0.0, 0.001))
    monkeypatch.setattr(confirm, "REQUESTS", 1000)
    monkeypatch.setattr(confirm, "SHORTEST", 3.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    monkeypatch.setattr(trial, "served", world.served)
    for module in (measuring, confirm):
        monkeypatch.setattr(module, "inputs", lambda *_: [])
    monkeypatch.setattr(measure, "curve", lambda asked, _: curves()[int(asked.name.removeprefix("threads-"))])
    monkeypatch.setattr(Model, "run", lambda model, *asked: world.run(model, *asked))
    monkeypatch.setattr(Model, "pressed", lambda model, *asked: world.pressed(model, *asked))
    return world


def wanted(folder: Path, slo: str = "p99 < 30ms", goal: grid.Goal = "latency", rate: float = 200.0) -> Wanted:
    return Wanted(goal, parse(slo), Traffic(rate), folder / "measured.json")
