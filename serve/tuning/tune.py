"""Tune: measure, fit, simulate every configuration, confirm the best live, and say what to change."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelathe.errors import BadInput, Refused
from serve.config import model_config
from serve.planning import served
from serve.planning.objective import Objective
from serve.repository.tree import CONFIG
from serve.simulate.configuration import Configuration
from serve.simulate.fitting import fitted
from serve.simulate.service import Curve
from serve.tuning import confirm, grid, kept, measure, trial
from serve.tuning.confirm import Confirmed, inputs
from serve.tuning.grid import Goal, Outcome, Space
from serve.tuning.live import Model, Traffic
from serve.tuning.measure import Asked, Tell
from serve.tuning.trial import Subject

LARGEST, MOST_INSTANCES = 32, 16
"""The largest batch that is tried of a model that takes more than its configuration has, and the most instances."""
FIT = "overheads"
"""The name of the copy that the overheads are fitted with."""
FIT_SECONDS, FASTEST = 5.0, 2000.0
"""Of the live run for the overheads, and its highest rate: beyond it the load generator takes the server's cores."""
SHARES = (0.3, 0.7)
"""How many requests should come during a call of one sample in that run, at the least and at the most."""


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
        BadInput: the model is not one that is tuned.
        Refused: no configuration holds; it names the nearest misses.
        MachineError: the machine is too busy to measure, or the server died.
    """
    today = checked(subject)
    wanted.measured.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    curves = _measured(subject, today, wanted, cores, tell)
    space = Space(curves, today, _largest(subject), wanted.traffic, wanted.objective)
    outcomes = grid.ranked(space, wanted.goal, tell)
    best = confirm.few(outcomes, today)
    if not any(one.holds for one in outcomes):
        raise _nothing(space, outcomes)
    now = _today(space, wanted.goal, best)
    confirmed = confirm.confirm(subject, space, best, now, wanted.measured.parent, tell)
    name = grid.percentile(wanted.objective)
    found = confirm.chosen(confirmed, lambda one, goal: grid.order(one, goal, name), wanted.goal)
    if found:
        kept.write(wanted.measured, subject, cores, curves, found.predicted.configuration)
    return _document(subject, space, wanted, confirmed, found)


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


def _largest(subject: Subject) -> int:
    """Return the largest batch to try."""
    now = int(subject.config.max_batch_size)
    axes = [spec.largest_batch for spec in subject.inputs() or () if spec.batched]
    return min(min(axes), max(now, LARGEST)) if now and axes else now


def _measured(subject: Subject, today: Configuration, wanted: Wanted, cores: int, tell: Tell) -> dict[int, Curve]:
    """Return the times of a call by number of threads, with the overheads; each is kept as soon as it is known."""
    largest, folder = _largest(subject), wanted.measured.parent
    curves = kept.read(wanted.measured, subject, cores)
    numbers = sorted({today.threads, cores, *(2**power for power in range(cores.bit_length()))})
    counts = {number: min(MOST_INSTANCES, max(2, cores // number)) for number in numbers if number not in curves}
    if not counts and any(one.outside for one in curves.values()):
        return curves
    whole = replace(today, max_batch=max(1, largest), delay=0.0, preferred=(), dynamic=False)
    busy = replace(whole, dynamic=largest > 0, instances=1)
    configs = {
        f"threads-{number}": trial.edited(subject.config, replace(whole, threads=number, instances=count))
        for number, count in counts.items()
    }
    configs[FIT] = trial.edited(subject.config, busy)
    tell("starting a server", 0.0)
    with trial.served(subject, configs, folder / "measuring.log") as endpoint:
        specs = inputs(subject, endpoint.plain, FIT)
        for number, count in counts.items():
            curves[number] = measure.curve(Asked(endpoint, f"threads-{number}", specs, count, largest), tell)
            kept.write(wanted.measured, subject, cores, curves, today)
        tell(f"live: {FIT}, {FIT_SECONDS:g} s", 0.0)
        fit = _overheads(Model(endpoint, FIT, specs, folder), curves[busy.threads], busy, wanted.traffic)
    found = {number: replace(one, inside=fit.inside, outside=fit.outside) for number, one in curves.items()}
    kept.write(wanted.measured, subject, cores, found, today)
    return found


def _overheads(model: Model, curve: Curve, configuration: Configuration, traffic: Traffic) -> Curve:
    """Return the curve with what server and client add, from a live run at which batches form."""
    call = float(curve.calls[1].mean())
    rate = min(max(traffic.rate, SHARES[0] / call), SHARES[1] / call, FASTEST)
    load = Traffic(rate, seed=traffic.seed)
    seen = model.run(load, FIT_SECONDS)
    p50 = float(sorted(seen.latencies)[len(seen.latencies) // 2])
    return fitted(curve, load.simulated(FIT_SECONDS), configuration, seen.calls, p50)


def _today(space: Space, goal: Goal, best: list[Outcome]) -> Outcome:
    """Return what is predicted of the present configuration: at the highest rate that it holds, or at the one asked."""
    if goal != "throughput":
        return space.outcome(space.today, space.traffic.rate)
    return space.highest(space.today) or space.outcome(space.today, best[0].rate)


def _nothing(space: Space, outcomes: list[Outcome]) -> Refused:
    """Return what is said where no configuration holds."""
    text = space.objective.text
    if not outcomes:
        return Refused(f"no configuration holds {text} at any rate that was tried", fix="allow more time")
    name = grid.percentile(space.objective)
    lowest = min(one.latency_ms[name] for one in outcomes)
    worst = max(outcomes[0].judged, key=lambda one: one.excess)
    misses = "; ".join(
        f"{' '.join(f'{key} {value}' for key, value in grid.knobs(one.configuration).items())}: "
        f"{name} {one.latency_ms[name]:.3g} ms"
        for one in outcomes[:3]
    )
    return Refused(
        f"no configuration holds {text} at {outcomes[0].rate:,.10g}/s: {worst.text} binds; nearest: {misses}",
        fix=f"ask for a lower rate, or for no less than {lowest:.3g} ms, or plan several machines: serve plan",
    )


def _document(
    subject: Subject, space: Space, wanted: Wanted, confirmed: list[Confirmed], found: Confirmed | None
) -> dict[str, Any]:
    configuration = found.predicted.configuration if found else space.today
    return {
        "model": subject.model,
        "version": subject.number,
        "goal": wanted.goal,
        "objective": wanted.objective.text,
        "rate": None if wanted.goal == "throughput" else wanted.traffic.rate,
        "arrival": str(wanted.traffic.trace or wanted.traffic.arrival),
        "configurations": sum(1 for _ in space.configurations()),
        "confirmed": [one.document() for one in confirmed],
        "chosen": {"name": found.name, **grid.knobs(configuration)} if found else None,
        "overheads": overheads(space.curves),
        "measured": str(wanted.measured),
        "diff": diff(subject, configuration),
    }


def overheads(curves: Mapping[int, Curve]) -> dict[str, float]:
    """Return what server and client add, in milliseconds."""
    curve = curves[min(curves)]
    return {"inside_ms": curve.inside * 1e3, "outside_ms": curve.outside * 1e3}


def diff(subject: Subject, configuration: Configuration) -> str:
    """Return what of `config.pbtxt` changes; empty where nothing does."""
    both = (subject.config, trial.edited(subject.config, configuration))
    before, after = (model_config.text(one).splitlines() for one in both)
    return "\n".join(difflib.unified_diff(before, after, f"a/{CONFIG}", f"b/{CONFIG}", lineterm="", n=2))
