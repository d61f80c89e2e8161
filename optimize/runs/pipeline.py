"""Pipeline: run a recipe from a trained model to a proven endpoint; resume where a killed run stopped.

A run's folder is its own (`optimize.runs.folder.resume`). It holds one bundle for each step (`0-trained`,
`1-prune.channels`, …), the recipe, the load test's results and the proof page. A bundle appears whole or not at all, so
whatever is there may be used again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelathe import files
from modelathe.commandline import document
from modelathe.errors import MachineError, UsageError
from modelathe.tensors import TensorSpec
from optimize.checks import every as checks
from optimize.checks.subject import Subject
from optimize.judge import speed
from optimize.judge.gate import Gate
from optimize.judge.speed import TRAINED, Timing
from optimize.methods.export.onnx import Onnx
from optimize.methods.table import METHODS, NAMES
from optimize.model.errors import BadGraph, BadModel, BadRecipe, BadWorkload, NoEffect
from optimize.runs import digest, judging
from optimize.runs.advance import advance, every_step, folder_name, measured
from optimize.runs.baseline import Progress, Trained, again, cost, establish, graph_of, silent
from optimize.runs.folder import resume
from optimize.runs.recipe import Recipe, ordered
from optimize.runs.run import Run, Terms, Turn
from optimize.source import splits
from optimize.source.code import commit
from optimize.source.workload import Workload, fewest
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.key import Key
from optimize.train import processes
from serve.config import curve, model_config, settings
from serve.config.target import Target
from serve.repository import scratch

if TYPE_CHECKING:
    from optimize.runs.endpoint import Proof


def run(
    recipe: Recipe | Mapping[str, Recipe],
    workload: Workload,
    *,
    output: Path | None = None,
    repository: Path | None = None,
    terms: Terms = Terms(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run `recipe` on `workload` and return the `optimize run` document.

    Args:
        recipe: from `optimize.runs.recipe.load`, or built in Python; or presets by their names, for the same target:
            where quality or speed of one is refused, or its method cannot take the model, the next one is tried.
        workload: bundles name the file that it was loaded from; of one that was made in Python and has no file, nothing
            that lies in the folder is kept.
        output: the run's folder, which must hold no other run; without it `build/runs/NAME/DIGEST`, where the digest
            is of recipe, code, weights and data. A step whose bundle lies there, made from the same model, code, data
            and config, is kept; without `output` it is also copied from other runs of the model. A preset that is tried
            after another has a folder of its own, in `output` one of its name.
        repository: where the result is published after it was proven on a real server, as a candidate if a version of
            the model is live; without it the run ends with the bundle, and `endpoint`, `load` and `version` are None.
        terms: what the user lets it do.
        progress: called with a text and the fraction of the current step.

    Raises:
        GateRefused: a gate said no and `terms.force` is not set; its `partial` is the document so far.
        BusyMachine: the same, where the machine alone was too busy for a gate to judge.
        UsageError: `output` is the folder of another run.
        BadRecipe, BadWorkload, BadModel, BadData, BadRepository: and the other errors of `optimize.model.errors`.
    """
    named = {"": recipe} if isinstance(recipe, Recipe) else recipe
    plans = {
        name: replace(plan, steps=ordered(plan.steps), target=_declared(plan.target, workload))
        for name, plan in named.items()
    }
    for plan in plans.values():
        _check(plan, workload)
    first, steps = next(iter(plans.values())), tuple(step for plan in plans.values() for step in plan.steps)
    _check_repository(first.target, workload, output, repository, terms)
    for place in [output, *(output / name for name in [*plans][1:])] if output else []:
        resume.check(place)
    checks.first(Subject(workload, steps, first.target, first.budget), progress)
    sets = splits.read(workload, progress, allow_overlap=terms.allow_overlap)
    workload = splits.stated(workload, sets)
    made_of = digest.trained(workload, sets)
    trained: Trained | None = None
    tried: list[dict[str, Any]] = []
    waiting = [*plans.items()]
    while True:
        preset, plan = waiting.pop(0)
        key = digest.run(plan, made_of, sets)
        runs = None if output else resume.RUNS / workload.name
        folder = (output / preset if tried else output) if output else resume.own(workload.name, key)
        resume.check(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with scratch.locked(folder):
            resume.begin(folder, key, plan.toml())
            model = folder / folder_name(0, TRAINED)
            if trained:
                trained = again(trained, model, progress)
            else:
                trained = establish(workload, model, made_of, progress, runs, sets.judging)
            turn = Turn(preset, [name for name, _ in waiting], [*tried])
            this = Run(plan, trained, sets, folder, terms, progress, runs, turn)
            result, why = _attempt(this, key, repository)
        if not why:
            return result
        tried.append({"preset": preset, "why": why, "page": result.get("report")})
        progress(f"the preset {preset} is refused: {why}; going on with {turn.following[0]}", 0.0)


def _check_repository(
    target: Target, workload: Workload, output: Path | None, repository: Path | None, terms: Terms
) -> None:
    """Say before anything starts that nothing could be published."""
    if repository is not None:
        from optimize.runs import endpoint

        endpoint.check(repository, workload, target)
        if (lacking := speed.lacking(target)) and not terms.allow_unmeasured:
            fix = "run it on a machine that has one, leave --repository out, or say --allow-unmeasured"
            raise MachineError(f"nothing is published whose speed is {lacking}", where="--repository", fix=fix)
        folder = output or resume.RUNS / workload.name
        if folder.resolve().is_relative_to(repository.resolve()):
            raise UsageError("the run's folder lies in the repository", where=str(folder), fix="name another --output")


def _attempt(this: Run, key: Key, repository: Path | None) -> tuple[dict[str, Any], str]:
    """Return the document of a run, and why the next preset is tried in its place; empty where this one stands.

    Raises:
        GateRefused, BusyMachine: a gate said no, and no other preset is tried.
    """
    following = this.turn.following and not this.terms.force
    try:
        judged, result = _run(this, key, repository)
    except (NoEffect, BadGraph, BadModel) as failure:
        if not following:
            raise
        return {}, failure.what
    refused = [entry for entry in judged if not entry.passed]
    if refused and following and all(entry.name.startswith(("quality", "promise")) for entry in refused):
        return result, "; ".join(map(judging.why, refused))
    if not this.terms.force:
        judging.stop(judged, this.folder, result, judging.instead(this.recipe, refused))
    return result, ""


def _run(this: Run, key: Key, repository: Path | None) -> tuple[list[Gate], dict[str, Any]]:
    """Make every step, time and judge the result, prove and publish it; return what was judged, and the document."""
    from optimize.report import page

    recipe, trained, workload = this.recipe, this.trained, this.trained.bundle.workload
    made = every_step(this)
    elements, last, quality = made.elements, made.bundle, made.quality
    resume.note(this.folder, key, made.keys)
    kept = judging.quality(this, last, quality)
    timing = judging.timed(this, elements, kept.passed)
    final = timing.result
    result = document(
        workload=workload.name,
        inferred=[*workload.inferred],
        recipe=recipe.document(),
        preset=this.turn.preset or None,
        tried=[*this.turn.tried],
        resumed=made.kept > 0,
        overlap=dict(this.sets.overlap),
        trained=measured(trained.quality, timing.cost(trained.cost, TRAINED)),
        steps=elements,
        result=measured(quality, timing.cost(cost(last), final)),
        endpoint=None,
        ratios=timing.ratios(final),
        warnings=judging.warnings(timing, timing.stages(), trained.cost),
        load=None,
        comparison=None,
        served=None,
        bundle=str(graph_of(last).parent.absolute()),
        version=None,
        environment=page.environment(recipe.target.device),
    )
    gates = [kept, *judging.promised(this, last, timing)]
    gates += judging.compiled(recipe.target, graph_of(last), workload.inputs, this.folder / "compiler.log")
    usual = _served(recipe, timing, TRAINED)
    recipe = replace(recipe, serve=_served(recipe, timing, final))
    if recipe.target.runtime == "tensorrt" and recipe.serve.precision == "FP32":
        recipe = replace(recipe, serve=settings.read(recipe.serve.document() | _precision(last), "[serve]"))
    if repository is not None and (this.terms.force or all(entry.passed for entry in gates)):
        from optimize.runs import endpoint

        told = {"made_of": {resume.RUN: key.digest, **key.parts}, "commit": commit(workload.source)}
        told |= {"trained": result["trained"]["quality"], "ratios": result["ratios"]}
        if this.turn.preset:
            told |= {"preset": this.turn.preset, "tried": result["tried"]}
        release = endpoint.Release(
            last,
            quality,
            repository,
            told,
            lambda proof: page.render(_ended(result, proof.gates, proof), this.folder, alone=True),
            usual,
        )
        prove = endpoint.unproven if timing.unmeasured else endpoint.prove
        proof = prove(replace(this, recipe=recipe), release, gates)
        gates, result = proof.gates, _ended(result, proof.gates, proof)
    else:
        result = _ended(result, gates)
    result["report"] = str(page.write(result, this.folder))
    files.write(this.folder / "run.json", json.dumps(result, indent=2, default=str))
    if this.runs:
        resume.point(this.folder)
    return gates, result


def apply_one(
    recipe: Recipe, source: Bundle, output: Path, *, terms: Terms = Terms(), progress: Progress = silent
) -> dict[str, Any]:
    """Run the only step of `recipe` on a bundle, save the result to `output`, and return its element of `steps[]`.

    Raises:
        BadData: an evaluation sample stands in another set, and the terms do not allow it.
        BadRecipe: a torch step on a bundle that went through a graph step.
        The errors of `optimize.methods.apply.apply`.
    """
    before = tuple(config for entry in source.lineage if (config := _config(entry)) is not None)
    ordered((*before, *recipe.steps), str(source.folder))
    bundles.check(output.absolute())
    workload = source.workload
    target = _declared(recipe.target, workload)
    recipe = replace(recipe, target=target)
    (step,) = recipe.steps
    checks.first(Subject(workload, recipe.steps, target), progress)
    sets = splits.read(workload, progress, allow_overlap=terms.allow_overlap)
    workload = splits.stated(workload, sets)
    source = replace(source, workload=workload)
    with scratch.folder() as place:
        trained = establish(workload, place / TRAINED, digest.trained(workload, sets), progress, samples=sets.judging)
        this = Run(recipe, trained, sets, place, terms, progress)
        if source.graph is None:
            source = replace(source, graph=graph_of(trained.bundle), key=trained.bundle.key)
        # What the bundle was made of is not what trains it now: the user's code of today does.
        key = Key({**trained.bundle.key.parts, **digest.step(step, source, recipe, sets).parts})
        made, quality, element = advance(step, source, this, key, output)
        progress("measuring speed", 0.0)
        files = {TRAINED: graph_of(trained.bundle), "source": graph_of(source), "result": graph_of(made)}
        if not source.lineage:
            del files["source"]
        labels = [*list(files)[:-1], element["name"]]
        timing = speed.time(files, labels, workload.inputs, target, patience=0.0)
        element |= measured(quality, timing.cost(cost(made), timing.result))
        element["ratios"] = timing.ratios(timing.result)
        element["warnings"] = judging.warnings(timing, timing.stages()[-2:], trained.cost)
        gates = judging.compiled(
            target, graph_of(made), workload.inputs, output.with_name(f"{output.name}.compiler.log")
        )
        element["gates"] = [entry.document() for entry in gates]
    judging.stop(gates, output, element)
    return element


def _declared(target: Target, workload: Workload) -> Target:
    """Return the target with its batch sizes at least as large as the smallest that the workload declares."""
    few = fewest(workload.inputs)
    return replace(target, batch=tuple(dict.fromkeys(max(batch, few) for batch in target.batch)))


def _served(recipe: Recipe, timing: Timing, name: str) -> settings.Settings:
    """Return the recipe's settings, with what the measured times of a file say where the user does not."""
    if timing.unmeasured:
        return recipe.serve
    return curve.fill(recipe.serve, timing.speeds.latency_ms(name), recipe.target.device)


def _precision(made: Bundle) -> dict[str, str]:
    """Return the setting without which TensorRT computes a narrower graph in FP32, and the accelerator it is for."""
    from optimize.tensorrt import rules

    return {"accelerator": "tensorrt", "precision": rules.allowed(graph_of(made))}


def _check(recipe: Recipe, workload: Workload) -> None:
    if not recipe.steps:
        raise BadRecipe("has no steps", fix="give at least one")
    if not workload.source and processes.size() > 1:
        raise BadWorkload(
            "was made in Python, and under torchrun every process loads it by itself",
            where=workload.name,
            fix="put it into a file, and name that as path/to/file.py:function",
        )
    if recipe.serve.sequence:
        raise BadRecipe(
            "a model that remembers cannot be proven request by request",
            where="[serve] sequence",
            fix="run it without --repository, then publish it with: serve add --settings",
        )
    outputs = [TensorSpec(name, "float32", ()) for name in workload.outputs]
    formed = model_config.max_batch_size(workload.inputs, recipe.target, recipe.serve)
    settings.check(recipe.serve, workload.inputs, outputs, recipe.target, formed)


def _ended(result: dict[str, Any], gates: list[Gate], proof: "Proof | None" = None) -> dict[str, Any]:
    """Return the document with what the gates said, and what the endpoint showed if it was served."""
    found = {}
    if proof:
        kept = ("endpoint", "load", "version", "comparison", "served")
        found = {name: getattr(proof, name) for name in kept}
    ended = {**result, **found, "gates": [entry.document() for entry in gates]}
    return {**ended, "places": _places(ended)}


def _places(result: dict[str, Any]) -> dict[str, Any]:
    """Return the gated metric of the torch model that was exported, of the ONNX file, and of the endpoint if served."""
    in_torch = [step for step in result["steps"] if METHODS[NAMES[step["name"]]].stage == "torch"]
    return {
        "torch": (in_torch or [result["trained"]])[-1]["quality"],
        "onnx": result["result"]["quality"],
        "endpoint": result["endpoint"] and result["endpoint"]["quality"],
    }


def _config(entry: dict[str, Any]) -> Any:
    config = NAMES.get(entry["name"])
    return None if config is None or config is Onnx else config(**entry["config"])
