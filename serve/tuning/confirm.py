"""Confirm: the best few configurations and today's, live, each beside what was predicted of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.record import statistics
from modelathe.client import connect
from modelathe.tensors import TensorSpec
from serve.planning.objective import Objective
from serve.simulate.configuration import Configuration
from serve.tuning import trial
from serve.tuning.grid import Goal, Outcome, Space, percentile
from serve.tuning.live import Model, Seen
from serve.tuning.measure import Tell
from serve.tuning.trial import Subject

BEST, SECONDS = 3, 8.0
"""How many are confirmed beside today's, and the seconds of each run, its warm-up of one apart."""
OFF = 0.2
"""The share by which a prediction may be off."""


@dataclass(frozen=True)
class Confirmed:
    """A configuration that was tried live.

    Args:
        name: `today`, or its place.
        predicted: what the simulation said.
        seen: what the live run saw.
        objective: what must hold.
    """

    name: str
    predicted: Outcome
    seen: Seen
    objective: Objective

    @property
    def measured(self) -> Outcome:
        """What was seen, as the simulation says it."""
        figures = statistics.milliseconds(self.seen.latencies)
        judged = self.objective.judge(figures, len(self.seen.latencies), self.seen.failed)
        return Outcome(self.predicted.configuration, self.predicted.rate, figures, tuple(judged), self.predicted.busy)

    @property
    def off(self) -> float:
        """The share by which the prediction is off: of the answers per second and of the objective's percentile."""
        name = percentile(self.objective)
        late = self.measured.latency_ms[name] / self.predicted.latency_ms[name] - 1
        fewer = 1 - self.seen.rate / self.predicted.rate
        return max(abs(late), abs(fewer))

    @property
    def sound(self) -> bool:
        """Whether it holds live, as was predicted."""
        return self.measured.holds and self.off <= OFF

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        name = percentile(self.objective)
        stated = (one.percentile for one in self.objective.conditions if one.metric.kind == "time")
        percent = next((one for one in stated if one is not None), 99.0)
        measured = self.measured
        return {
            "name": self.name,
            "predicted": self.predicted.document(),
            "measured": {
                "rate": self.seen.rate,
                "requests": len(self.seen.latencies),
                "failed": self.seen.failed,
                "latency_ms": measured.latency_ms,
                "interval_ms": {name: list(self.seen.interval(percent))},
                "holds": measured.holds,
            },
            "off": self.off,
            "sound": self.sound,
        }


def confirm(
    subject: Subject, space: Space, best: Sequence[Outcome], today: Outcome, folder: Path, tell: Tell
) -> list[Confirmed]:
    """Return today's configuration and the best few, as they are live.

    Raises:
        MachineError: the server died.
    """
    wanted = {"today": today, **{f"best-{place}": one for place, one in enumerate(best, 1)}}
    configs = {name: trial.edited(subject.config, one.configuration) for name, one in wanted.items()}
    found = []
    with trial.served(subject, configs, folder / "server.log") as endpoint:
        for place, (name, predicted) in enumerate(wanted.items()):
            tell(f"live: {name}, {SECONDS:g} s", place / len(wanted))
            model = Model(endpoint, name, inputs(subject, endpoint.plain, name), folder)
            seen = model.run(space.traffic.at(predicted.rate), SECONDS)
            found.append(Confirmed(name, predicted, seen, space.objective))
    return found


def inputs(subject: Subject, url: str, name: str) -> list[TensorSpec]:
    """Return the inputs as requests carry them: as the lineage has them, else as the server does."""
    stated = subject.inputs()
    if stated is not None:
        return stated
    with connect(url) as client:
        return client.metadata(name)[0]


def few(outcomes: Sequence[Outcome], today: Configuration) -> list[Outcome]:
    """Return the best that hold, today's apart, one for each threads × instances: the others differ by little."""
    found: dict[tuple[int, int], Outcome] = {}
    for one in outcomes:
        if one.holds and one.configuration != today:
            found.setdefault((one.configuration.threads, one.configuration.instances), one)
    return list(found.values())[:BEST]


def chosen(confirmed: Sequence[Confirmed], order: Callable[[Outcome, Goal], Any], goal: Goal) -> Confirmed | None:
    """Return the best of those that held live as predicted; None where none did."""
    sound = [one for one in confirmed if one.sound]
    return min(sound, key=lambda one: order(one.measured, goal), default=None)
