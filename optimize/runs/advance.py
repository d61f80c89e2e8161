"""Advance: from one bundle to the next by a step, and through all steps of a recipe, keeping what was made before."""

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from loadtest.plan.data import payload
from optimize.graph.graph import drop_node_names
from optimize.judge import speed
from optimize.judge.evaluate import Quality, evaluate
from optimize.judge.mates import deviation
from optimize.judge.measure import Cost
from optimize.methods import apply as steps_of
from optimize.methods.export.onnx import export
from optimize.methods.quantize import left
from optimize.methods.table import METHODS
from optimize.predict.module import TorchPredictor
from optimize.predict.runtimes import open_graph
from optimize.runs import digest, follower
from optimize.runs.baseline import cost, counting, graph_of, reusable
from optimize.runs.recipe import Recipe
from optimize.runs.run import Run
from optimize.source import sample, splits
from optimize.source.workload import Workload, fewest
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.contract import Context, Method
from optimize.step.key import Key
from serve.config import model_config
from serve.repository import scratch

SAMPLES = 512
"""So many evaluation samples are drawn to measure how much an output depends on its batch mates."""


def advance(
    step: Any, source: Bundle, this: Run, key: Key, folder: Path, *, last: bool = False
) -> tuple[Bundle, Quality, dict[str, Any]]:
    """Apply one step to a bundle; return the bundle that it saved in `folder`, its quality, and its lineage entry.

    A training goes on after the last epoch of one that was killed while it made a bundle of the same `key`.

    The graph of the `last` graph step goes without the names of its nodes, which no step will ask for.
    """
    method, recipe, progress = METHODS[type(step)], this.recipe, this.progress
    workload = source.workload
    checkpoints = folder.absolute().with_name(f".{folder.name}.checkpoint")
    checkpoint = checkpoints / key.digest[:16]
    for old in checkpoints.glob("*"):
        if old != checkpoint:
            shutil.rmtree(old)
    progress(method.name, 0.0)
    with scratch.folder() as place:
        # The teacher is a model of its own: a step trains `source.module`, which may be the very same object.
        context = Context(
            follower.workload_for(step, workload),
            this.trained.bundle.module,
            recipe.target,
            recipe.seed,
            place,
            progress,
            checkpoint,
            exported=_exported(source, this),
        )
        torch.manual_seed(recipe.seed)
        subject = graph_of(source) if method.stage == "graph" else source.module
        with follower.joined(step, source, recipe, checkpoint):
            made = steps_of.apply(step, subject, context)
        if steps_of.quantizes(step):
            later = recipe.steps[recipe.steps.index(step) + 1 :]
            if said := left.told(method, step, subject, made, last=not any(map(steps_of.quantizes, later))):
                progress(said, 1.0)
        module = made if method.stage == "torch" else source.module
        if method.stage == "torch":
            graph = export(module, workload.inputs, workload.outputs, place / bundles.GRAPH, real=workload.first())
        else:
            graph = drop_node_names(made) if last and method.stage == "graph" else made
        treated = Bundle(workload, module, graph)
        quality, judged = _judged(treated, method, this)
        entry = {
            "name": method.name,
            "config": {entry.name: getattr(step, entry.name) for entry in fields(step)},
            "seed": recipe.seed,
            "runtime": recipe.target.runtime,
            **judged,
            "cost": cost(treated).document(),
        }
        if method.selects:
            judged_on = splits.selecting(workload, step.judge_samples)
            entry |= {"selected_on": splits.source(workload), "selected_samples": splits.size(judged_on, "evaluation")}
        if method.stage != "torch":
            entry |= _deviation(graph, workload, recipe)
        saved = bundles.save(replace(treated, lineage=(*source.lineage, entry)), folder, key)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return saved, quality, entry


def _exported(source: Bundle, this: Run) -> Path | None:
    """Return the ONNX file that this run, or one with the same key, exported of the bundle's module."""
    graph = source.graph
    return graph if graph is not None and graph.is_relative_to(this.folder.absolute()) else None


def _judged(made: Bundle, method: Method, this: Run) -> tuple[Quality, dict[str, Any]]:
    """Judge what a step made, in torch before the export; return its quality, and what the lineage says of it."""
    workload, graph, recipe, trained = made.workload, graph_of(made), this.recipe, this.trained
    in_torch = method.stage == "torch"
    told = counting(this.progress, f"{method.name}: evaluating", "samples", this.sets.judging)
    with TorchPredictor(made.module, workload.outputs) if in_torch else open_graph(graph, recipe.target) as predictor:
        quality = evaluate(predictor, workload, trained.reference, largest_batch(workload, recipe), told)
    overlap = {"overlap": dict(this.sets.overlap)} if this.sets.overlap else {}
    # A CPU computes what the graph says, in the precision that it has for it.
    emulated = {"emulated": True} if speed.lacking(recipe.target) and not in_torch else {}
    return quality, {"trained": trained.quality.document()["quality"], **quality.document(), **emulated, **overlap}


def _deviation(graph: Path, workload: Workload, recipe: Recipe) -> dict[str, Any]:
    """Return how much each output depends on its batch mates, for evaluation samples and for generated ones.

    It goes into the lineage, with the largest batch, which serving settings may change. What batches the evaluation
    set comes in does not matter: the server makes its own.

    A load test sends generated inputs, which deviate more than real ones.
    """
    largest = largest_batch(workload, recipe)
    real = [batch.inputs for batch in sample.rows(workload, "evaluation", SAMPLES)]
    generated = payload.generate(workload.inputs, 2, recipe.seed, batch=largest)
    few = fewest(workload.inputs)
    one, other = (
        deviation(graph, inputs, largest, seed=recipe.seed, target=recipe.target, few=few)
        for inputs in (real, generated)
    )
    return {"deviation": {name: max(one[name], other[name]) for name in one}, "deviation_batch": largest}


@dataclass(frozen=True)
class Made:
    """All steps of a run: their elements, the last bundle and its quality, keys by folder, how many were kept."""

    elements: list[dict[str, Any]]
    bundle: Bundle
    quality: Quality
    keys: dict[str, str]
    kept: int


def every_step(this: Run) -> Made:
    """Run the steps that have no bundle yet, and those after one that was made anew."""
    recipe, trained = this.recipe, this.trained
    elements: list[dict[str, Any]] = []
    keys: dict[str, str] = {}
    current, quality, kept = trained.bundle, trained.quality, 0
    for number, (step, name) in enumerate(zip(recipe.steps, folders(recipe), strict=True), 1):
        method, last, place = METHODS[type(step)], number == len(recipe.steps), this.folder / name
        key = digest.step(step, current, recipe, this.sets, last=last)
        made = reusable(place, current.workload, key, this.progress, this.runs) if kept == number - 1 else None
        if made is None:
            made, quality, _ = advance(step, current, this, key, place, last=last)
        else:
            kept += 1
            this.progress(f"{method.name}: kept from the last run", 1.0)
            made, quality = _judged_again(made, current, method, this)
        elements.append(dict(made.lineage[-1]))
        keys[place.name] = key.digest
        current = made
    return Made(elements, current, quality, keys, kept)


def _judged_again(made: Bundle, before: Bundle, method: Method, this: Run) -> tuple[Bundle, Quality]:
    """Return a bundle that was kept and its quality; its lineage, on disk too, says what is found out today.

    Today's sets may overlap otherwise, today's machine may compute otherwise, and today's serving settings may send
    larger batches than those that its key knows of.
    """
    quality, judged = _judged(made, method, this)
    old = made.lineage[-1]
    entry = {**{key: value for key, value in old.items() if key not in ("overlap", "emulated")}, **judged}
    elsewhere = old.get("emulated") != judged.get("emulated")
    if "deviation" in entry and (elsewhere or old.get("deviation_batch") != largest_batch(made.workload, this.recipe)):
        entry |= _deviation(graph_of(made), made.workload, this.recipe)
    return bundles.retell(made, (*before.lineage, entry)), quality


def measured(quality: Quality, cost: Cost) -> dict[str, Any]:
    """Return the scores and the cost as every document of ours holds them."""
    return {**quality.document(), "cost": cost.document()}


def largest_batch(workload: Workload, recipe: Recipe) -> int:
    """Return the most samples that the result will be sent at once."""
    formed = model_config.max_batch_size(workload.inputs, recipe.target, recipe.serve)
    return formed or max(recipe.target.batch)  # without batches of the server, those that clients make


def folders(recipe: Recipe) -> list[str]:
    """Return the names of the steps' folders, in their order."""
    return [folder_name(number, name) for number, name in enumerate(recipe.names, 1)]


def folder_name(number: int, name: str) -> str:
    """Return the name of a step's folder in that of its run."""
    return f"{number}-{name}"
