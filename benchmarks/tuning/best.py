"""The best that `serve tune` finds beside the live best of an exhaustive sweep of a small grid."""

import statistics
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from serve.simulate.configuration import Configuration
from serve.tuning import grid
from serve.tuning.live import Model, Traffic
from tuning import subjects
from tuning.ledger import Figures, Ledger, Rule

THREADS, INSTANCES, LARGEST, DELAYS = (1, 2), (1, 2), (4, 16, 32), (0, 2000)
RATES = {subjects.DIGITS: 600.0, subjects.TEXTS: 60.0}
"""Requests per second at which the p99 is to be the least."""
SECONDS, FINALISTS, AGAIN = 6.0, 3, 3
"""Of each run; the best few of the sweep, and ours, are run so often again, in turns: the least of many figures is in
part luck."""
RUNS, NEAR = "live runs of serve tune", "tuned over the live best of the sweep, p99"
WANTED = {
    f"{model}, {name}": rule
    for model in subjects.MODELS
    for name, rule in ((NEAR, Rule("≤", 1.05)), (RUNS, Rule("≤", 5.0)), ("configurations", Rule("≥", 24.0)))
}
COLUMNS = ("configuration", "p50 ms", "p99 ms", "again: p99 ms")


def run(ledger: Ledger) -> None:
    """Sweep the grid live, tune, and run the best of both again."""
    for model in subjects.MODELS:
        options = ("--slo", subjects.SLO, "--for", "latency", "--rate", f"{RATES[model]:g}")
        found = subjects.tuned(ledger, model, *options)
        if found["chosen"] is None:
            continue
        swept = sweep(ledger, model)
        best = sorted(swept, key=lambda name: ledger.cells[_key(model, name)]["p99"])[:FINALISTS]
        last = {name: swept[name] for name in best} | {"tuned": subjects.chosen(model, found)}
        again = [(f"{_key(model, name)}, again {turn}", name) for turn in range(AGAIN) for name in last]
        _measure(ledger, model, last, again)


def sweep(ledger: Ledger, model: str) -> dict[str, Configuration]:
    """Measure the whole grid, and return it by name."""
    made = {}
    for threads, instances, limit, delay in product(THREADS, INSTANCES, LARGEST, DELAYS):
        turned = {"threads": threads, "instances": instances, "max_batch": limit, "delay_us": delay}
        name = f"{threads} x {instances}, batch {limit}, delay {delay}"
        made[name] = subjects.configured(subjects.default(model), **turned)
    _measure(ledger, model, made, [(_key(model, name), name) for name in made])
    return made


def _measure(
    ledger: Ledger, model: str, configurations: Mapping[str, Configuration], cells: list[tuple[str, str]]
) -> None:
    if not ledger.missing(key for key, _ in cells):
        return
    places = {name: f"copy-{place}" for place, name in enumerate(configurations)}
    with subjects.served(model, {places[name]: one for name, one in configurations.items()}) as copies:
        for seed, (key, name) in enumerate(cells):
            copy, turned = copies[places[name]], grid.knobs(configurations[name])
            ledger.once(key, _cell, model, copy, turned, seed)


def _cell(model: str, copy: Model, turned: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**turned, **subjects.figures(copy.run(Traffic(RATES[model], seed=seed), SECONDS))}


def _key(model: str, name: str) -> str:
    return f"{model}: {name}"


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield each configuration with its p50 and p99, and the p99 of the runs in the end; then what was tuned."""
    for key, cell in ledger.cells.items():
        if ", again" in key:
            continue
        again = [found["p99"] for other, found in ledger.cells.items() if other.startswith(f"{key}, again")]
        if "serve tune" in key:
            model = key.partition(":")[0]
            mine = f"{model}: tuned, again"
            again = [found["p99"] for other, found in ledger.cells.items() if other.startswith(mine)]
            yield {"model": model, "tuned": cell["chosen"], "runs": len(cell["confirmed"]), "again": again}
        else:
            yield {"model": key.partition(":")[0], "cell": key, **cell, "again": again}


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return how near the tuned configuration comes to the best of the sweep, by medians of the runs in the end."""
    made = {}
    for model in subjects.MODELS:
        mine = [row for row in found if row["model"] == model]
        swept = [row for row in mine if "cell" in row]
        finals = [statistics.median(row["again"]) for row in swept if row["again"]]
        for row in mine:
            if "tuned" in row:
                made[f"{model}, {RUNS}"] = float(row["runs"])
                if row["again"] and finals:
                    made[f"{model}, {NEAR}"] = statistics.median(row["again"]) / min(finals)
        if swept:
            made[f"{model}, configurations"] = float(len(swept))
    return made


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table, the best first."""
    for row in sorted(found, key=lambda row: (row["model"], row.get("p99", 0.0))):
        again = " ".join(f"{value:.3g}" for value in row["again"])
        if "cell" in row:
            yield (row["cell"], f"{row['p50']:.3g}", f"{row['p99']:.3g}", again)
        else:
            turned = row["tuned"] or {}
            text = ", ".join(f"{key} {value}" for key, value in turned.items() if key != "name")
            yield (f"{row['model']}: tuned: {text}", "", "", again)
