"""Pipeline: run a recipe from a trained model to a proven endpoint; resume where a killed run stopped.

A run's folder holds one bundle for each step (`0-trained`, `1-prune.channels`, …), the recipe, the load test's results
and the proof page. A bundle appears whole or not at all, so whatever is there may be used again.
"""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from loadtest import files, payload
from loadtest.commandline import document
from loadtest.errors import UsageError
from loadtest.tensors import TensorSpec
from optimize import bundle as bundles
from optimize import extra, follower, gate, measure, resume
from optimize import step as steps_of
from optimize.baseline import TRAINED, Progress, Trained, cost, establish, graph_of, reusable, silent
from optimize.bundle import Bundle
from optimize.errors import BadRecipe, BadWorkload, GateRefused
from optimize.evaluate import Quality, compare, evaluate
from optimize.explain import Stage
from optimize.export.graph import drop_node_names
from optimize.export.onnx import Onnx, export
from optimize.export.verify import deviation
from optimize.gate import Gate
from optimize.measure import Cost, Speeds
from optimize.predict import TorchPredictor, cut, open_graph
from optimize.recipe import Recipe, ordered
from optimize.workload import Workload
from serve import curve, model_config, scratch, settings
from serve.target import Target

SAMPLES = 512
"""So many evaluation samples are drawn from to measure how much an output depends on its batch mates."""


def run(
    recipe: Recipe,
    workload: Workload,
    *,
    output: Path | None = None,
    repository: Path | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `recipe` on `workload` and return the `optimize run` document.

    Args:
        recipe: from `optimize.recipe.load`, or built in Python.
        workload: from `optimize.workload.load`, so that the bundles can name its file.
        output: the run's folder; `build/runs/NAME` unless given. Resumed when recipe, code and data are the same.
        repository: where the result is published after it was proven on a real server; without it the run ends with
            the bundle, and `endpoint`, `load` and `version` are None.
        force: publish although a gate said no; the lineage says so for ever.
        strict: judge the worse end of the paired interval, not the value.
        progress: called with a text and the fraction of the current step.

    Raises:
        GateRefused: a gate said no and `force` is not set; its `partial` is the document so far.
        BadRecipe, BadWorkload, BadModel, BadData, BadRepository and the other errors of `optimize.errors`.
    """
    recipe = replace(recipe, steps=ordered(recipe.steps))
    _check(recipe, workload)
    folder = output or Path("build/runs") / workload.name
    if repository is not None:
        from optimize import endpoint

        endpoint.check(repository, workload, recipe.target)
        if folder.resolve().is_relative_to(repository.resolve()):
            raise UsageError("the run's folder lies in the repository", where=str(folder), fix="name another --output")
    resume.check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch.alone(folder):
        return _run(recipe, workload, folder, repository, force, strict, progress)


def _run(
    recipe: Recipe,
    workload: Workload,
    folder: Path,
    repository: Path | None,
    force: bool,
    strict: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Run in a folder that is this run's alone; arguments as for `run`."""
    from optimize.report import page

    resumed = resume.prepare(folder, recipe, workload, progress)
    trained = establish(workload, folder / f"0-{TRAINED}", progress)
    elements, last, quality = _steps(recipe, trained, folder, progress)
    speeds = _speeds(trained.bundle, folder, elements, recipe, progress)
    final = _folder_name(len(elements), elements[-1]["name"])
    result = document(
        workload=workload.name,
        recipe=recipe.document(),
        resumed=resumed,
        trained=_measured(trained.quality, _timed(trained.cost, speeds, TRAINED)),
        steps=elements,
        result=_measured(quality, _timed(cost(last), speeds, final)),
        endpoint=None,
        ratios=ratios(trained.bundle, last, speeds, final),
        load=None,
        bundle=str(last.folder),
        version=None,
        environment=page.environment(recipe.target.device),
    )
    gates = _gates(recipe, trained, last, quality, speeds, elements, folder, strict)
    if recipe.target.device == "cuda":
        recipe = replace(recipe, serve=curve.fill(recipe.serve, speeds.latency_ms(final)))
    if repository is not None and (force or all(entry.passed for entry in gates)):
        from optimize import endpoint

        proof = endpoint.prove(last, trained, quality, recipe, folder, repository, gates, force, progress)
        gates = proof.gates
        result |= {"endpoint": proof.endpoint, "load": proof.load, "version": proof.version}
    result["places"] = _places(result)
    result["gates"] = [entry.document() for entry in gates]
    result["report"] = str(page.write(result, folder))
    files.write(folder / "run.json", json.dumps(result, indent=2, default=str))
    if not force:
        _stop(gates, folder, result)
    return result


def apply_one(step: Any, source: Bundle, output: Path, target: Target, seed: int, progress: Progress) -> dict[str, Any]:
    """Run one step on a bundle, save the result to `output`, and return its element of `steps[]`.

    Raises:
        BadRecipe: a torch step on a bundle that went through a graph step.
        The errors of `optimize.step.apply`.
    """
    before = tuple(config for entry in source.lineage if (config := _config(entry)) is not None)
    ordered((*before, step), str(source.folder))
    bundles.check(output.absolute())
    workload = source.workload
    recipe = Recipe((step,), seed, target=target)
    extra.require(target.runtime)
    steps_of.check_needs(step, workload)
    with scratch.folder() as place:
        trained = establish(workload, place / TRAINED, progress)
        if source.graph is None:
            source = replace(source, graph=graph_of(trained.bundle))
        made, quality, element = advance(step, source, trained, recipe, output, progress)
        progress("measuring speed", 0.0)
        paths = {TRAINED: graph_of(trained.bundle), "result": graph_of(made)}
        speeds = measure.speed(paths, workload.inputs, target, baseline=TRAINED)
        element |= _measured(quality, _timed(cost(made), speeds, "result"))
        element["ratios"] = ratios(trained.bundle, made, speeds, "result")
    return element


def advance(
    step: Any,
    source: Bundle,
    trained: Trained,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    last: bool = False,
) -> tuple[Bundle, Quality, dict[str, Any]]:
    """Apply one step to a bundle; return the bundle that it saved in `folder`, its quality, and its lineage entry.

    The graph of the `last` graph step goes without the names of its nodes, which no step will ask for.
    """
    method = steps_of.METHODS[type(step)]
    workload = source.workload
    checkpoint = folder.absolute().with_name(f".{folder.name}.checkpoint")
    progress(method.name, 0.0)
    with scratch.folder() as place:
        # The teacher is a model of its own: a step trains `source.module`, which may be the very same object.
        context = steps_of.Context(
            workload, trained.bundle.module, recipe.target, recipe.seed, place, progress, checkpoint
        )
        torch.manual_seed(recipe.seed)
        subject = graph_of(source) if method.stage == "graph" else source.module
        with follower.joined(step, source, recipe, checkpoint):
            made = steps_of.apply(step, subject, context)
        module = made if method.stage == "torch" else source.module
        if method.stage == "torch":
            graph = export(module, workload.inputs, workload.outputs, place / bundles.GRAPH, real=workload.first())
        else:
            graph = drop_node_names(made) if last and method.stage == "graph" else made
        progress(f"{method.name}: evaluating", 0.9)
        in_torch = method.stage == "torch"
        with TorchPredictor(module, workload.outputs) if in_torch else open_graph(graph, recipe.target) as predictor:
            quality = evaluate(predictor, workload, trained.reference, _largest(workload, recipe))
        entry = {
            "name": method.name,
            "config": {entry.name: getattr(step, entry.name) for entry in fields(step)},
            "seed": recipe.seed,
            "trained": trained.quality.document()["quality"],
            **_measured(quality, cost(Bundle(workload, module, graph))),
        }
        if method.stage != "torch":
            entry["deviation"] = _deviation(graph, workload, recipe)
        saved = bundles.save(Bundle(workload, module, graph, (*source.lineage, entry)), folder)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return saved, quality, entry


def _deviation(graph: Path, workload: Workload, recipe: Recipe) -> float:
    """Return how much an output depends on its batch mates, for evaluation samples and for generated ones.

    A load test sends generated inputs, which deviate more than real ones.
    """
    largest = _largest(workload, recipe)
    pieces = [piece for batch in workload.batches("evaluation") for piece in cut(batch.inputs, largest)]
    spread = pieces[:: -(-len(pieces) * largest // SAMPLES)]
    generated = payload.generate(workload.inputs, 2, recipe.seed, batch=largest)
    return max(deviation(graph, inputs, seed=recipe.seed, target=recipe.target) for inputs in (spread, generated))


def ratios(trained: Bundle, result: Bundle, speeds: Speeds, name: str) -> dict[str, Any]:
    """Return `{size, latency{}, throughput{}, interval{}}`, larger is better.

    They are against the trained FP32 ONNX in ONNX Runtime, whatever runtime the target names for the result.
    """
    size = measure.file_bytes(graph_of(trained)) / measure.file_bytes(graph_of(result))
    reached = {str(batch): ratio for batch, ratio in speeds.ratios(name, TRAINED).items()}
    values = {batch: ratio.value for batch, ratio in reached.items()}
    return {
        "size": size,
        "latency": values,
        "throughput": values,
        "interval": {batch: [ratio.low, ratio.high] for batch, ratio in reached.items()},
    }


def _check(recipe: Recipe, workload: Workload) -> None:
    if not recipe.steps:
        raise BadRecipe("has no steps", fix="give at least one")
    if not workload.source:
        raise BadWorkload(
            "was not loaded from a file",
            where=workload.name,
            fix='use optimize.workload.load("path/to/file.py:function")',
        )
    extra.require(recipe.target.runtime)
    for step in recipe.steps:
        steps_of.check_needs(step, workload)
    gate.check_budget(recipe.budget, workload)
    if recipe.serve.sequence:
        raise BadRecipe(
            "a model that remembers cannot be proven request by request",
            where="[serve] sequence",
            fix="run it without --repository, then publish it with: serve add --settings",
        )
    outputs = [TensorSpec(name, "float32", ()) for name in workload.outputs]
    settings.check(recipe.serve, workload.inputs, outputs, recipe.target, _largest(workload, recipe))


def _steps(
    recipe: Recipe, trained: Trained, folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], Bundle, Quality]:
    """Run the steps that have no bundle yet; return all elements, the last bundle and its quality."""
    elements: list[dict[str, Any]] = []
    current, quality = trained.bundle, trained.quality
    for number, step in enumerate(recipe.steps, 1):
        name = steps_of.METHODS[type(step)].name
        place = folder / _folder_name(number, name)
        made = reusable(place, current.workload, progress)
        if made is None:
            last = number == len(recipe.steps)
            made, quality, _ = advance(step, current, trained, recipe, place, progress, last=last)
        else:
            progress(f"{name}: kept from the last run", 1.0)
            if number == len(recipe.steps):
                with open_graph(graph_of(made), recipe.target) as predictor:
                    largest = _largest(made.workload, recipe)
                    quality = evaluate(predictor, made.workload, trained.reference, largest)
        elements.append(dict(made.lineage[-1]))
        current = made
    return elements, current, quality


def _speeds(
    trained: Bundle, folder: Path, elements: list[dict[str, Any]], recipe: Recipe, progress: Progress
) -> Speeds:
    """Time every step's ONNX file against the trained one's, alternating, and add the figures to the elements."""
    progress("measuring speed", 0.0)
    names = [_folder_name(number, element["name"]) for number, element in enumerate(elements, 1)]
    paths = {TRAINED: graph_of(trained), **{name: folder / name / bundles.GRAPH for name in names}}
    speeds = measure.speed(paths, trained.workload.inputs, recipe.target, baseline=TRAINED)
    for name, element in zip(names, elements, strict=True):
        element["cost"] = {
            **element["cost"],
            "latency_ms": {str(batch): value for batch, value in speeds.latency_ms(name).items()},
            "throughput": {str(batch): value for batch, value in speeds.throughput(name).items()},
        }
    return speeds


def _gates(
    recipe: Recipe,
    trained: Trained,
    last: Bundle,
    quality: Quality,
    speeds: Speeds,
    elements: list[dict[str, Any]],
    folder: Path,
    strict: bool,
) -> list[Gate]:
    workload = last.workload
    first, result = trained.quality.scores[0], quality.scores[0]
    difference = compare(workload, result, first)
    gates = [gate.quality(recipe.budget, first, result, difference, strict)]
    gates += gate.size(recipe.budget, measure.file_bytes(graph_of(last)))
    final = _folder_name(len(elements), elements[-1]["name"])
    stages = _stages(trained, folder, elements, speeds)
    promises = set().union(*(steps_of.METHODS[type(step)].promises for step in recipe.steps))
    if "smaller" in promises:
        gates.append(gate.smaller(ratios(trained.bundle, last, speeds, final)["size"], stages))
    if "faster" in promises:
        gates += [gate.faster(batch, ratio, stages) for batch, ratio in speeds.ratios(final, TRAINED).items()]
    return gates


def _stages(trained: Trained, folder: Path, elements: list[dict[str, Any]], speeds: Speeds) -> list[Stage]:
    stages = [Stage(TRAINED, graph_of(trained.bundle), speeds.latency_ms(TRAINED))]
    for number, element in enumerate(elements, 1):
        place = _folder_name(number, element["name"])
        stages.append(Stage(element["name"], folder / place / bundles.GRAPH, speeds.latency_ms(place)))
    return stages


def _stop(gates: list[Gate], folder: Path, result: dict[str, Any]) -> None:
    try:
        gate.stop(gates, str(folder))
    except GateRefused as refusal:
        refusal.partial = result
        raise


def _places(result: dict[str, Any]) -> dict[str, Any]:
    """Return the gated metric of the torch model that was exported, of the ONNX file, and of the endpoint if served."""
    in_torch = [step for step in result["steps"] if steps_of.METHODS[steps_of.NAMES[step["name"]]].stage == "torch"]
    return {
        "torch": (in_torch or [result["trained"]])[-1]["quality"],
        "onnx": result["result"]["quality"],
        "endpoint": result["endpoint"] and result["endpoint"]["quality"],
    }


def _measured(quality: Quality, cost: Cost) -> dict[str, Any]:
    return {**quality.document(), "cost": cost.document()}


def _timed(cost: Cost, speeds: Speeds, name: str) -> Cost:
    return replace(cost, latency_ms=speeds.latency_ms(name), throughput=speeds.throughput(name))


def _largest(workload: Workload, recipe: Recipe) -> int:
    return model_config.max_batch_size(workload.inputs, recipe.target, recipe.serve)


def _folder_name(number: int, name: str) -> str:
    return f"{number}-{name}"


def _config(entry: dict[str, Any]) -> Any:
    config = steps_of.NAMES.get(entry["name"])
    return None if config is None or config is Onnx else config(**entry["config"])
