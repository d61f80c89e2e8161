"""Tune: measure, fit, simulate every configuration, try the best live, fit anew, and say what to change."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelathe.errors import BadInput, Refused
from serve.config import model_config
from serve.planning import served
from serve.planning.objective import Objective
from serve.repository.tree import CONFIG
from serve.simulate.configuration import Configuration
from serve.tuning import confirm, grid, measuring, picture, trial
from serve.tuning.confirm import Choice, Live
from serve.tuning.grid import Goal, Outcome, Space
from serve.tuning.live import Traffic
from serve.tuning.measure import Tell
from serve.tuning.measuring import Place, part
from serve.tuning.trial import Subject

MEASURED, SIMULATED, TRIED, AGAIN = 0.25, 0.45, 0.7, 0.4
"""The share of the time until the end of each stage: measuring, simulating, the first live runs; and of what is left
then, the share of simulating again."""
AFTER = 1
"""Live runs that are left for what is best once the first have corrected the simulation."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Args:
        goal: what is best.
        objective: what must hold.
        traffic: when requests come.
        measured: the file of measured times.
    """

    goal: Goal
    objective: Objective
    traffic: Traffic
    measured: Path


def tune(subject: Subject, wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Return the document: what was predicted and measured, which configuration is the best, and the difference.

    Raises:
        BadInput: the model is not one that is tuned, or the traffic is too thin to tell whether the objective holds.
        Refused: no configuration holds; it names the nearest misses.
        MachineError: the machine is too busy to measure, or the server died.
    """
    today, goal = checked(subject), wanted.goal
    _check_enough(wanted)
    wanted.measured.parent.mkdir(parents=True, exist_ok=True)
    place = Place(subject, today, len(os.sched_getaffinity(0)), wanted.measured)
    fresh = not measuring.complete(place)
    known = measuring.measured(place, wanted.traffic, part(tell, 0.0, MEASURED))
    space = Space(known, today, measuring.largest(subject), wanted.traffic, wanted.objective)
    _check_reachable(space)
    outcomes = _ranked(space, goal, part(tell, MEASURED, SIMULATED))
    live = Live(place, known, goal, confirm.RUNS - fresh * measuring.RUNS)
    first = confirm.few(outcomes, today, live.left - 1 - AFTER)
    names = {f"best-{number}": one for number, one in enumerate(first, 1)}
    live.run(space, {"today": _today(space, goal, outcomes), **names}, part(tell, SIMULATED, TRIED))
    space, outcomes = _again(space, live, outcomes, tell)
    found = confirm.choice(live.confirmed, goal)
    chosen = found.chosen.predicted.configuration if found.chosen else today
    place.keep(space.known.settled(), chosen)
    return _document(subject, space, wanted, live, found)


def _again(space: Space, live: Live, outcomes: list[Outcome], tell: Tell) -> tuple[Space, list[Outcome]]:
    """Correct the simulation by the live runs, rank the grid again, and try what is best now, while runs are left."""
    done = TRIED
    while True:
        space = space.refitted([one.tried for one in live.confirmed])
        if not live.left:
            return space, outcomes
        simulated = done + AGAIN * (1 - done)
        outcomes = grid.ranked(space, live.goal, part(tell, done, simulated))
        following = live.next(outcomes)
        if following is None:
            return space, outcomes
        done = simulated + AGAIN * (1 - simulated)
        live.run(space, {f"best-{len(live.confirmed)}": following}, part(tell, simulated, done))


def checked(subject: Subject) -> Configuration:
    """Return the present configuration.

    Raises:
        BadInput: the model is an ensemble, remembers, runs on a GPU, or in a backend whose threads are set otherwise.
    """
    found, config = served.configuration(subject.config), subject.config
    on_gpu = any(group.kind == group.KIND_GPU for group in config.instance_group)
    if config.backend != "onnxruntime" or on_gpu:
        where = "a GPU" if on_gpu else f"the backend {config.backend!r}"
        raise BadInput(
            f"is served by {where}, whose threads are not tuned",
            where=subject.model,
            fix="tune a model of onnxruntime on the CPU",
        )
    return found


def _check_enough(wanted: Wanted) -> None:
    """Refuse an objective of which no live run tells whether it holds.

    Raises:
        BadInput: the longest one sends too few requests.
    """
    if wanted.goal == "throughput":
        return
    sent, enough = len(wanted.traffic.simulated(confirm.LONGEST)), wanted.objective.requests
    if sent < enough:
        raise BadInput(
            f"{wanted.objective.text}: the longest live run, {confirm.LONGEST:g} s, sends {sent:,} requests, and"
            f" {enough:,} are needed to tell",
            fix="ask for a lower percentile, or tune for a higher rate",
        )


def _check_reachable(space: Space) -> None:
    """Refuse an objective that not even a request alone keeps.

    Raises:
        Refused: it says the lowest that is reachable.
    """
    alone = space.alone()
    broken = [one for one in alone.judged if not one.passed]
    if broken:
        worst = max(broken, key=lambda one: one.excess)
        name = grid.percentile(space.objective)
        lowest = f"{alone.latency_ms[name]:.3g} ms"
        raise Refused(
            f"{worst.text} is below the time of one call: the lowest reachable {name} is {lowest}",
            fix=f"ask for no less than {lowest}, or make the model smaller: optimize run",
        )


def _ranked(space: Space, goal: Goal, tell: Tell) -> list[Outcome]:
    """Return outcomes, the best first.

    Raises:
        Refused: none holds; it names the nearest misses and which condition binds.
    """
    outcomes = grid.ranked(space, goal, tell)
    if any(one.holds for one in outcomes):
        return outcomes
    worst = max(outcomes[0].judged, key=lambda one: one.excess)
    name = grid.percentile(space.objective)
    misses = "; ".join(f"{_knobs(one.configuration)}: {name} {one.latency_ms[name]:.3g} ms" for one in outcomes[:3])
    raise Refused(
        f"no configuration holds {space.objective.text} at {outcomes[0].rate:,.10g}/s: {worst.text} binds;"
        f" nearest: {misses}",
        fix="ask for a lower rate or allow more time, or plan several machines: serve plan",
    )


def _knobs(configuration: Configuration) -> str:
    return " ".join(f"{key} {value}" for key, value in grid.knobs(configuration).items())


def _today(space: Space, goal: Goal, outcomes: Sequence[Outcome]) -> Outcome:
    """Return what is predicted of the present configuration: at the highest rate that it holds, or at the one asked."""
    if goal != "throughput":
        return space.outcome(space.today, space.traffic.rate)
    return space.highest(space.today) or space.outcome(space.today, outcomes[0].rate)


def _document(subject: Subject, space: Space, wanted: Wanted, live: Live, found: Choice) -> dict[str, Any]:
    chosen = found.chosen.predicted.configuration if found.chosen else space.today
    known = space.known
    curve = known.curve(chosen.threads)
    others = [one for one in live.confirmed[1:] if one is found.chosen] or live.confirmed[1:]
    shown = confirm.best(others or live.confirmed, wanted.goal)
    return {
        "model": subject.model,
        "version": subject.number,
        "goal": wanted.goal,
        "objective": wanted.objective.text,
        "limit_ms": wanted.objective.longest * 1e3 or None,
        "rate": None if wanted.goal == "throughput" else wanted.traffic.rate,
        "arrival": str(wanted.traffic.trace or wanted.traffic.arrival),
        "cores": known.cores,
        "configurations": sum(1 for _ in space.configurations()),
        "confirmed": [one.document() for one in live.confirmed],
        "best": found.best and found.best.name,
        "chosen": {"name": found.chosen.name, **grid.knobs(chosen)} if found.chosen else None,
        "overheads": {
            "inside_ms": curve.inside * 1e3,
            "outside_ms": curve.outside * 1e3,
            "request_cpu_ms": known.request * 1e3,
        },
        **picture.pictures(space, live.confirmed[0], shown),
        "measured": str(wanted.measured),
        "diff": diff(subject, chosen),
    }


def diff(subject: Subject, configuration: Configuration) -> str:
    """Return what of `config.pbtxt` changes; empty where nothing does."""
    both = (subject.config, trial.edited(subject.config, configuration))
    before, after = (model_config.text(one).splitlines() for one in both)
    return "\n".join(difflib.unified_diff(before, after, f"a/{CONFIG}", f"b/{CONFIG}", lineterm="", n=2))
