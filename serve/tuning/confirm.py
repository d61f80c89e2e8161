"""Confirm: today's configuration and the best few, live, each beside what was predicted of it before."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from loadtest.record import statistics
from serve.planning.objective import Objective
from serve.simulate.configuration import Configuration
from serve.tuning import trial
from serve.tuning.grid import Goal, Outcome, Space, order, percentile
from serve.tuning.known import Known, Tried
from serve.tuning.live import Model, Traffic
from serve.tuning.measure import Tell
from serve.tuning.measuring import Place
from serve.tuning.trial import inputs

RUNS = 5
"""Live runs at the most, those for the overheads included."""
REQUESTS, SHORTEST, LONGEST = 4000, 8.0, 25.0
"""Requests that a run should send, and its seconds at the least and at the most; a warm-up of one comes before."""
ENOUGH = 1.1
"""How many times the requests that it takes to tell a percentile a run should send: arrivals vary."""
MARGIN = 0.9
"""The share of the highest predicted rate at which a configuration is tried: just below it, latency says nothing."""
OFF = 0.2
"""The share by which a prediction may be off."""
GAIN = 0.05
"""The share by which a rate must be higher to be better: the simulation tells no less."""


@dataclass(frozen=True)
class Confirmed:
    """A configuration that was tried live.

    Args:
        name: `today`, or its place.
        predicted: what the simulation said before, of the very requests that were sent.
        tried: the live run.
        objective: what must hold.
    """

    name: str
    predicted: Outcome
    tried: Tried
    objective: Objective

    @property
    def measured(self) -> Outcome:
        """What was seen, as the simulation says it; too few requests for the objective's percentile hold nothing."""
        seen = self.tried.seen
        figures = statistics.milliseconds(seen.latencies)
        judged = self.objective.judge(figures, len(seen.latencies), seen.failed)
        if len(seen.latencies) < self.objective.requests:
            judged = [replace(one, passed=False) for one in judged]
        return Outcome(self.predicted.configuration, self.predicted.rate, figures, tuple(judged), self.predicted.busy)

    @property
    def interval(self) -> tuple[float, float]:
        """Between which milliseconds the objective's percentile lies, with 95 % confidence."""
        return self.tried.seen.interval(statistics.PERCENTILES.get(percentile(self.objective), 99.0))

    @property
    def off(self) -> float:
        """The share by which the prediction is off: of the objective's percentile and of the answers per second.

        All requests that come are predicted to be answered in the time in which they come.
        """
        name, seen = percentile(self.objective), self.tried.seen
        late = self.measured.latency_ms[name] / self.predicted.latency_ms[name] - 1
        fewer = 1 - seen.rate * self.tried.seconds / len(seen.latencies)
        return max(abs(late), abs(fewer))

    @property
    def sound(self) -> bool:
        """Whether it holds live, as was predicted."""
        return self.measured.holds and self.off <= OFF

    def better(self, other: "Confirmed", goal: Goal) -> bool:
        """Whether it is better than another by more than chance: it holds, and the other does not or is worse."""
        if not self.measured.holds or not other.measured.holds:
            return self.measured.holds
        if goal == "throughput":
            return self.predicted.rate > other.predicted.rate * (1 + GAIN)
        mine, theirs = (one.threads * one.instances for one in (self._configuration, other._configuration))
        if goal == "cores" and mine != theirs:
            return mine < theirs
        name = percentile(self.objective)
        late, compared = self.measured.latency_ms[name], other.measured.latency_ms[name]
        return goal == "latency" and late < other.interval[0] and compared > self.interval[1]

    @property
    def _configuration(self) -> Configuration:
        return self.predicted.configuration

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        seen, measured = self.tried.seen, self.measured
        return {
            "name": self.name,
            "predicted": self.predicted.document(),
            "measured": {
                "rate": seen.rate,
                "requests": len(seen.latencies),
                "seconds": self.tried.seconds,
                "failed": seen.failed,
                "latency_ms": measured.latency_ms,
                "interval_ms": {percentile(self.objective): list(self.interval)},
                "holds": measured.holds,
                "cores": {"ours": seen.used.ours, "others": seen.used.others},
            },
            "off": self.off,
            "sound": self.sound,
        }


@dataclass(frozen=True)
class Asked:
    """A live run to be made: its name, what is predicted of it, its traffic and its seconds."""

    name: str
    predicted: Outcome
    traffic: Traffic
    seconds: float

    def is_(self, tried: Tried) -> bool:
        """Whether it was made already."""
        mine = (self.predicted.configuration, self.traffic, self.seconds)
        return mine == (tried.configuration, tried.traffic, tried.seconds)


class Live:
    """The live runs of one `serve tune`, each kept as soon as it has ended.

    Args:
        place: where the model is.
        known: what was measured; its runs are those of a call that was cut short.
        goal: what is best.
        left: how many there may be.
    """

    def __init__(self, place: Place, known: Known, goal: Goal, left: int) -> None:
        self.place, self.goal, self.left = place, goal, left
        self.made = known.live
        self.confirmed: list[Confirmed] = []

    def run(self, space: Space, wanted: Mapping[str, Outcome], tell: Tell) -> None:
        """Try configurations, as many as may be.

        Args:
            space: what predicts them.
            wanted: what was found of each, by name.
            tell: of progress.

        Raises:
            MachineError: the server died, or other programs used the cores.
        """
        asked = [self._asked(space, name, one) for name, one in list(wanted.items())[: self.left]]
        new = {one.name: one.predicted.configuration for one in asked if not any(map(one.is_, self.made))}
        with ExitStack() as stack:
            if new:
                tell("live: starting a server", 0.0)
                configs = {name: trial.edited(self.place.subject.config, one) for name, one in new.items()}
                log = self.place.folder / "live.log"
                endpoint = stack.enter_context(trial.served(self.place.subject, configs, log))
                specs = inputs(self.place.subject, endpoint.plain, next(iter(new)))
            for step, one in enumerate(asked):
                if one.name in new:
                    tell(f"live: {one.name}, {one.seconds:.0f} s{self._best()}", step / len(asked))
                    seen = Model(endpoint, one.name, specs, self.place.folder).run(one.traffic, one.seconds)
                    tried = Tried(one.predicted.configuration, one.traffic, one.seconds, seen)
                    self.made = (*self.made, tried)
                    self.place.keep(replace(space.known, live=self.made))
                tried = next(filter(one.is_, self.made))
                self.confirmed.append(Confirmed(one.name, one.predicted, tried, space.objective))
                self.left -= 1

    def _asked(self, space: Space, name: str, outcome: Outcome) -> Asked:
        """Return the run, with what is predicted of the very requests that will be sent."""
        again = sum(one.predicted.configuration == outcome.configuration for one in self.confirmed)
        rate = outcome.rate * MARGIN if self.goal == "throughput" else outcome.rate
        wanted = max(REQUESTS, ENOUGH * space.objective.requests)
        seconds = min(LONGEST, max(SHORTEST, wanted / rate))
        traffic = replace(space.traffic.at(rate), seed=space.traffic.seed + again)
        predicted = replace(space, traffic=traffic).outcome(outcome.configuration, rate, seconds)
        return Asked(name, predicted, traffic, seconds)

    def _best(self) -> str:
        """Return the best of those that held so far, in words."""
        held = [one for one in self.confirmed if one.measured.holds]
        return f", best so far {best(held, self.goal).name}" if held else ""

    def next(self, outcomes: Sequence[Outcome]) -> Outcome | None:
        """Return the best that is predicted now, unless it was tried and was as predicted; None where nothing is."""
        first = next((one for one in outcomes if one.holds), None)
        known = first and [one for one in self.confirmed if one.predicted.configuration == first.configuration]
        return None if known and known[-1].sound else first


def best(confirmed: Sequence[Confirmed], goal: Goal) -> Confirmed:
    """Return the best by what was measured."""
    name = percentile(confirmed[0].objective)
    return min(confirmed, key=lambda one: order(one.measured, goal, name))


def few(outcomes: Sequence[Outcome], today: Configuration, count: int) -> list[Outcome]:
    """Return the best that hold, today's apart, one for each threads × instances: the others differ by little."""
    found: dict[tuple[int, int], Outcome] = {}
    for one in outcomes:
        if one.holds and one.configuration != today:
            found.setdefault((one.configuration.threads, one.configuration.instances), one)
    return list(found.values())[:count]


@dataclass(frozen=True)
class Choice:
    """What comes of the live runs.

    Args:
        best: the best that held live, however far its prediction was off; None where none did.
        chosen: the best that held live as predicted, or today's where none is better; None where nothing held.
    """

    best: Confirmed | None
    chosen: Confirmed | None


def choice(confirmed: Sequence[Confirmed], goal: Goal) -> Choice:
    """Return what comes of live runs, today's the first of them.

    Today's configuration needs no prediction: it stays unless another is better by more than chance.
    """
    today = confirmed[0]
    held = [one for one in confirmed if one.measured.holds]
    if not held:
        return Choice(None, None)
    sound = [one for one in held if one.sound and one.better(today, goal)]
    stays = today if today.measured.holds else None
    first = best(held, goal)
    if stays and not first.better(today, goal):
        first = stays
    return Choice(first, best(sound, goal) if sound else stays)
