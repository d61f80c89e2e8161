"""What tuning gains: over Triton's own default, and over what `optimize run` writes, in four objectives."""

import json
import statistics
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

import loadtest
from serve.simulate.configuration import THREADS, Configuration
from serve.tuning import trial
from serve.tuning.live import Traffic
from tuning import subjects
from tuning.ledger import OUTPUT, Figures, Ledger, NotMeasured, Rule

BUDGET = 50.0
"""Seconds of a search for the highest rate."""
SIDES = ("triton", "default", "tuned")
SECONDS, TURNS = 6.0, 3
GAIN = "rate under p99 < 20ms, tuned over Triton's default"
OBJECTIVES = {
    "p50 at a tenth": ("latency", 0.1, "p50"),
    "p99 at a half": ("latency", 0.5, "p99"),
    "cores at a half": ("cores", 0.5, "p99"),
}
"""Beside the rate: for what is tuned, at which share of the default's rate, and which percentile is asked for."""
RATE = "rate under p99 < 20ms"
NAMES = (RATE, *OBJECTIVES)
WANTED = {f"{model}, {GAIN}": Rule("≥", 1.3) for model in subjects.MODELS} | {
    f"{model}, {name}, tuned over our default": Rule("≥", 0.97) for model in subjects.MODELS for name in NAMES
}
"""Of a latency, and of cores, it is the default's over the tuned one's: larger is better."""
COLUMNS = ("model", "objective", "Triton's default", "our default", "tuned", "tuned is")


def run(ledger: Ledger) -> None:
    """Search the highest rates, tune for each objective, and run both configurations in turns."""
    for model in subjects.MODELS:
        found = subjects.tuned(ledger, model, "--slo", subjects.SLO)
        best = subjects.chosen(model, found)
        for side in SIDES:
            ledger.once(f"{model}: rate, {side}", highest, model, side, best)
        most = ledger.cells[f"{model}: rate, default"]["rate"]
        for name, (goal, share, percentile) in OBJECTIVES.items():
            rate = float(f"{share * min(most or 0.0, subjects.FASTEST):.2g}")
            options = ("--slo", f"{percentile} < {subjects.LIMIT_MS}ms", "--for", goal, "--rate", f"{rate:g}")
            mine = subjects.chosen(model, subjects.tuned(ledger, model, *options))
            ledger.once(f"{model}: {name}", turns, model, mine, rate, percentile)


def highest(model: str, side: str, tuned: Configuration) -> dict[str, Any]:
    """Return the highest rate that one side holds, with its interval."""
    made = subjects.subject(model)
    config = tritons(made.config) if side == "triton" else made.config
    return rate_of(model, trial.edited(made.config, tuned) if side == "tuned" else config)


def rate_of(model: str, config: ModelConfig) -> dict[str, Any]:
    """Return the highest rate that a configuration holds, with its interval, and the instances that the server has.

    Raises:
        NotMeasured: no probe counted, as where something else takes the load generator's time.
    """
    made = subjects.subject(model)
    with trial.served(made, {model: config}, OUTPUT / model / "rate.log") as endpoint:
        found = loadtest.capacity(
            model, endpoint.grpc, subjects.SLO, budget=BUDGET, repository=subjects.REPOSITORY, quiet=True
        )
        with urllib.request.urlopen(f"{endpoint.http}/v2/models/{model}/config") as answer:  # noqa: S310 - ours
            told = json.load(answer)
    if found.failure and found.rate != found.rate:
        raise NotMeasured(f"{model}: {found.failure.what}")
    instances = sum(group["count"] for group in told["instance_group"])
    return {"rate": found.rate, "low": found.low, "high": found.high, "instances": instances}


def tritons(config: ModelConfig) -> ModelConfig:
    """Return the configuration as one writes it for Triton: `dynamic_batching {}`, threads and instances left to it."""
    made = ModelConfig()
    made.CopyFrom(config)
    made.ClearField("instance_group")
    made.ClearField("dynamic_batching")
    made.dynamic_batching.SetInParent()
    for name in (THREADS, "session.force_spinning_stop"):
        if name in made.parameters:
            del made.parameters[name]
    return made


def turns(model: str, tuned: Configuration, rate: float, percentile: str) -> dict[str, Any]:
    """Return what both configurations show at a rate, in turns."""
    sides = {"default": subjects.default(model), "tuned": tuned}
    seen: dict[str, list[float]] = {side: [] for side in sides}
    with subjects.served(model, sides) as copies:
        for turn in range(TURNS):
            for side in sorted(sides, reverse=bool(turn % 2)):
                seen[side].append(subjects.figures(copies[side].run(Traffic(rate, seed=turn), SECONDS))[percentile])
    taken = {side: one.threads * one.instances for side, one in sides.items()}
    return {"rate": rate, "percentile": percentile, **seen, "taken": taken}


def rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield each objective of each model, with what every side reached and the ratio; larger is better."""
    for model in subjects.MODELS:
        rates = {side: ledger.cells.get(f"{model}: rate, {side}") for side in SIDES}
        if rates["tuned"]:
            values = {side: one["rate"] for side, one in rates.items()}
            yield {"model": model, "objective": RATE, **values, "ratio": _over(values["tuned"], values["default"])}
        for name in OBJECTIVES:
            if cell := ledger.cells.get(f"{model}: {name}"):
                cores = name.startswith("cores")
                sides = {side: statistics.median(cell[side]) for side in ("default", "tuned")}
                reached = cell["taken"] if cores and sides["tuned"] < subjects.LIMIT_MS else sides
                more = {"rate": cell["rate"], "percentile": cell["percentile"]}
                row = {"model": model, "objective": name, **more, "triton": None, **reached}
                yield row | {"ratio": _over(reached["default"], reached["tuned"])}


def _over(value: float | None, other: float | None) -> float:
    return value / other if value and other else float("nan")


def figures(found: list[Mapping[str, Any]]) -> Figures:
    """Return the gain over Triton's default, and all four ratios to ours."""
    made = {}
    for row in found:
        made[f"{row['model']}, {row['objective']}, tuned over our default"] = row["ratio"]
        if row["objective"] == RATE:
            made[f"{row['model']}, {GAIN}"] = _over(row["tuned"], row["triton"])
    return made


def cells(found: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield the table."""
    for row in found:
        sides = ("" if row[side] is None else f"{row[side]:.4g}" for side in SIDES)
        at = f", {row['rate']:g}/s" if "rate" in row else ""
        yield (row["model"], f"{row['objective']}{at}", *sides, f"{row['ratio']:.2f}×")
