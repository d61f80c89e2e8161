"""The simulation beside the live server, over configurations that nothing was fitted to."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from loadtest.record import statistics
from serve.planning.engines.calls import capacity
from serve.simulate.configuration import Configuration
from serve.simulate.simulation import simulate
from serve.tuning import grid
from serve.tuning.grid import Space
from serve.tuning.live import Model, Traffic
from tuning import subjects
from tuning.ledger import Figures, Ledger, Rule

INSTANCES = ((1, 1), (2, 1), (1, 2))
"""Threads and instances."""
BATCHING = ((4, 0), (16, 0), (32, 2000), (8, 500))
"""Largest batch and delay in microseconds. None has the largest batch without a delay: the overheads are fitted so."""
SHARES = (0.3, 0.55, 0.8)
"""Of the highest rate that is simulated, or that the load generator sends beside the server."""
SECONDS, SEEDS = 8.0, range(5)
LIMITS = {"throughput": 0.05, "p50": 0.10, "p99": 0.20}
WANTED = {f"{name} within {limit:.0%}: share of cells": Rule("≥", 0.9) for name, limit in LIMITS.items()}


def configurations(base: Configuration) -> dict[str, Configuration]:
    """Return those that are compared, by what is turned of one."""
    found = {}
    for (threads, instances), (limit, delay) in product(INSTANCES, BATCHING):
        turned = {"threads": threads, "instances": instances, "max_batch": limit, "delay_us": delay}
        found[f"{threads} x {instances}, batch {limit}, delay {delay}"] = subjects.configured(base, **turned)
    return found


def run(ledger: Ledger) -> None:
    """Measure every cell: a configuration at a rate."""
    for model in subjects.MODELS:
        found = subjects.tuned(ledger, model, "--slo", subjects.SLO)
        fitted = [subjects.configured(subjects.default(model), **one["predicted"]) for one in found["confirmed"]]
        space = subjects.space(model)
        wanted = {name: one for name, one in configurations(space.today).items() if one not in fitted}
        keys = {
            f"{model}: {name}, {share:.0%}": (name, share * min(_highest(space, one), subjects.FASTEST))
            for name, one in wanted.items()
            for share in SHARES
        }
        if not ledger.missing(keys):
            continue
        with subjects.served(model, {f"copy-{place}": one for place, one in enumerate(wanted.values())}) as copies:
            for key, (name, rate) in keys.items():
                copy = copies[f"copy-{list(wanted).index(name)}"]
                ledger.once(key, _cell, wanted[name], copy, rate)


def _highest(space: Space, configuration: Configuration) -> float:
    return capacity(space.curves[configuration.threads], configuration)


def _cell(configuration: Configuration, copy: Model, rate: float) -> dict[str, Any]:
    """Return the live figures; the prediction is made anew whenever the table is, from the kept times."""
    seed = int(rate) + configuration.max_batch
    seen = copy.run(Traffic(rate, seed=seed), SECONDS)
    return {**grid.knobs(configuration), "rate": rate, "seed": seed, "live": subjects.figures(seen)}


def predicted(space: Space, configuration: Configuration, rate: float, seed: int) -> Figures:
    """Return the same figures of the very same arrivals, of several simulations together."""
    load = Traffic(rate, seed=seed).simulated(SECONDS)
    made = [simulate(load, space.curves[configuration.threads], configuration, seed=one) for one in SEEDS]
    times = statistics.milliseconds(np.concatenate([one.latencies for one in made]))
    throughput = np.mean([one.answered.size / max(SECONDS, float(one.requests["end"].max())) for one in made])
    return {"throughput": float(throughput), "p50": times["p50"], "p99": times["p99"]}


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield each cell that was measured, with its prediction and how far that is off."""
    for model in subjects.MODELS:
        cells = {key: cell for key, cell in ledger.cells.items() if key.startswith(f"{model}: ") and "live" in cell}
        if not cells:
            continue
        space = subjects.space(model)
        for key, cell in cells.items():
            configuration = subjects.configured(space.today, **cell)
            said = predicted(space, configuration, cell["rate"], cell["seed"])
            off = {name: said[name] / cell["live"][name] - 1 for name in LIMITS}
            yield {"cell": key, **cell, "predicted": said, "off": off}


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return the shares of cells that are as near as wanted, and within 5, 10 and 20 %."""
    made = {}
    for name, limit in LIMITS.items():
        off = np.abs([row["off"][name] for row in found])
        made[f"{name} within {limit:.0%}: share of cells"] = float((off <= limit).mean()) if found else float("nan")
        for other in (0.05, 0.1, 0.2):
            made[f"{name}, cells within {other:.0%}"] = float((off <= other).mean()) if found else float("nan")
    return {**made, "cells": float(len(found))}


COLUMNS = ("cell", "rate", "answers/s", "off", "p50 ms", "off", "p99 ms", "off")


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table: each figure as predicted and as measured, and the difference."""
    for row in found:
        pairs = [
            text
            for name in LIMITS
            for text in (f"{row['predicted'][name]:.4g} | {row['live'][name]:.4g}", f"{row['off'][name]:+.0%}")
        ]
        yield (row["cell"], f"{row['rate']:.0f}", *pairs)
