"""Study: what methods cost and gain on each layer, or group of layers, of a model."""

import glob
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from optimize.judge import effect as effects
from optimize.judge import measure
from optimize.judge.ruler import Until
from optimize.methods.export.onnx import export
from optimize.methods.table import BY_NAME, METHODS, NAMES
from optimize.model.errors import BadBundle, BadGraph, BadModel, BadRecipe, NoEffect
from optimize.source import splits
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from serve.repository import scratch

SECONDS = 4.0
"""After how many seconds a treated file is no more timed against the untreated one, if nine rounds took no longer."""


def judged(workload: Workload, samples: int) -> tuple[Workload, str]:
    """Return the workload with the samples that a study judges on as its evaluation set, and the set that they are of.

    What is chosen by a study must not be judged on the same samples again: they are those of a search inside a step. A
    workload that has none is judged on its evaluation set, and the study's page says so.
    """
    kind = splits.source(workload)
    return (workload, "evaluation") if kind is None else (splits.selecting(workload, samples), kind)


def groups(names: Iterable[str], depth: int) -> dict[str, list[str]]:
    """Return the layers by the first `depth` parts of their module's path; 0 leaves every layer by itself."""
    found: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition("/")[0] or name
        found.setdefault(".".join(module.split(".")[:depth]) if depth else name, []).append(name)
    return found


def study(
    configs: Sequence[Any], source: Bundle, context: Context, depth: int = 0
) -> tuple[list[effects.Effect], list[dict[str, str]]]:
    """Treat each layer, or group of layers, alone with each of the methods, and measure what that costs and gains.

    Args:
        configs: of methods that can `exclude` layers; the config's own is added to.
        source: a float model: of a workload, or a bundle whose last step is a torch step or the export.
        context: its workload gives the judged samples, its target the batch sizes to time.
        depth: as for `groups`.

    Returns:
        The effects, methods and layers in their order; and `{name, method, why}` of what could not be treated.

    Raises:
        BadRecipe: a method that cannot leave layers alone.
        BadBundle: the model is not a float one any more.
    """
    _check(configs, source)
    workload, context = context.workload, replace(context, methods=BY_NAME)
    found_effects: list[effects.Effect] = []
    skipped: list[dict[str, str]] = []
    with scratch.folder() as place:
        context.progress("judging the untreated model", 0.0)
        plain = source.graph or export(source.module, workload.inputs, workload.outputs, place / "model.onnx")
        against = effects.untreated(plain, context)
        for config in configs:
            method = METHODS[type(config)]
            subject = plain if method.stage == "graph" else source.module
            found = groups(method.matches(subject), depth)
            for number, (name, members) in enumerate(found.items(), 1):
                context.progress(f"{method.name}: {name}, {number} of {len(found)}", number / len(found))
                try:
                    with scratch.folder() as folder:
                        path = _treated(config, subject, members, folder, context)
                        effect = effects.effect(name, method.name, path, against, context)
                        timed = _timed(effect, path, against, context)
                        found_effects.append(replace(timed, members=tuple(map(glob.escape, members))))
                except (NoEffect, BadGraph, BadModel) as refusal:
                    skipped.append({"name": name, "method": method.name, "why": refusal.what})
    return found_effects, skipped


def _check(configs: Sequence[Any], source: Bundle) -> None:
    for config in configs:
        method = METHODS[type(config)]
        if not hasattr(config, "exclude") or method.stage == "export":
            able = [name for name, kind in NAMES.items() if "exclude" in {entry.name for entry in fields(kind)}]
            raise BadRecipe(f"{method.name} cannot leave layers alone", fix=f"use one of {', '.join(able)}")
    last = source.lineage[-1]["name"] if source.lineage else ""
    if last in NAMES and METHODS[NAMES[last]].stage != "torch" and last != "export.onnx":
        raise BadBundle(
            f"its last step is {last}: its layers cannot be told apart any more",
            where=str(source.folder),
            fix="give a workload, or the bundle of a step before",
        )


def _treated(config: Any, subject: Any, members: Sequence[str], folder: Path, context: Context) -> Path:
    """Return the ONNX file of the model in which only `members` were treated."""
    method, workload = METHODS[type(config)], context.workload
    if method.stage == "graph":
        spared = effects.others(subject, members)
    else:
        spared = tuple(glob.escape(name) for name in method.matches(subject) if name not in members)
    made = effects.treat(method, replace(config, exclude=(*config.exclude, *spared)), subject, folder, context)
    if isinstance(made, Path):
        return made
    return export(made, workload.inputs, workload.outputs, folder / "model.onnx")


def _timed(untimed: effects.Effect, path: Path, against: effects.Untreated, context: Context) -> effects.Effect:
    """Return the effect with its speed, measured against the untreated file."""
    files = {"untreated": against.path, "treated": path}
    speeds = measure.speed(files, context.workload.inputs, context.target, until=Until(seconds=SECONDS))
    ratios = speeds.ratios("treated", "untreated")
    return replace(
        untimed,
        speedup={str(batch): ratio.value for batch, ratio in ratios.items()},
        interval={str(batch): (ratio.low, ratio.high) for batch, ratio in ratios.items()},
        control={str(batch): (ratio.low, ratio.high) for batch, ratio in speeds.control().items()},
    )
