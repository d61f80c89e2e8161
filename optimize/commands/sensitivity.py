"""`optimize sensitivity`: what each layer loses and gains when a method treats it alone."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting
from modelathe.errors import UsageError
from optimize.commands.options import overlap_option
from optimize.methods.table import METHODS, NAMES

if TYPE_CHECKING:
    from optimize.source.workload import Workload


@click.command()
@click.argument("source")
@click.option("--output", required=True, type=PATH, help="The HTML page to write.")
@click.option("--method", help="Methods, with commas.  [default: quantize.static or .dynamic, and prune.channels]")
@click.option(
    "--ratio", type=Number(min=0), default=0.5, show_default=True, help="Share that a pruning method removes."
)
@click.option(
    "--samples", type=click.IntRange(0), default=0, help="Samples to judge on.  [default: as many as evaluation]"
)
@click.option("--depth", type=click.IntRange(0), default=0, help="Group layers by so many parts of their path.")
@click.option("--batch", default="1,32", show_default=True, help="Batch sizes to measure at.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seeds every choice.")
@overlap_option
@quiet_option
@json_option
def sensitivity(
    source: str,
    output: Path,
    method: str | None,
    ratio: float,
    samples: int,
    depth: int,
    batch: str,
    seed: int,
    allow_overlap: bool,
    as_json: bool,
) -> None:
    """Treat each layer of SOURCE, a float workload or bundle, alone, and show what that loses and gains.

    Loss is of the workload's first score, against the untreated ONNX file; so is speed, with one file open at a time.
    The samples are none that judge a recipe's result, where the workload has others. Losses of single layers do not
    add up: quantize.mixed judges whole assignments.

    \b
    Example:
      optimize sensitivity digits_cnn.py --output build/sensitivity.html
    """
    from optimize.report import sensitivity as report
    from optimize.runs import open as sources
    from optimize.runs import recipe, study
    from optimize.source import splits
    from optimize.step.contract import Context
    from serve.config.target import Target
    from serve.repository import scratch

    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UsageError("no page can be written there", where=str(output), fix="name a file in a folder of yours")
    with reporting() as progress, scratch.folder() as folder:
        bundle = sources.load(source)
        sets = splits.read(bundle.workload, progress, allow_overlap=allow_overlap)
        workload, judged_on = study.judged(bundle.workload, samples)
        progress(f"judging on {judged_on} samples", 0.0)
        configs = _configs(method, ratio, workload)
        sizes = [int(size) if size.strip().isdigit() else size for size in batch.split(",")]
        target = recipe.build(Target, {"batch": sizes}, "--batch")
        context = Context(workload, workload.build(), target, seed, folder, progress)
        effects, skipped = study.study(configs, bundle, context, depth)
    result = document(
        source=source,
        workload=workload.name,
        samples=splits.size(workload, "evaluation"),
        judged_on=judged_on,
        overlap=dict(sets.overlap),
        steps=[_step(config) for config in configs],
        batch=[int(size) for size in (effects[0].speedup if effects else ())],
        layers=[effect.document() for effect in effects],
        skipped=skipped,
    )
    report.write(result, output)
    if as_json:
        emit(result)
    else:
        report.table(result, output)


def _configs(methods: str | None, ratio: float, workload: "Workload") -> list[Any]:
    """Return the config of each method that was named, or of those that suit the workload, which has what they need."""
    from optimize.methods import apply as step

    names = methods or f"quantize.{'static' if workload.calibration else 'dynamic'},prune.channels"
    configs = [_config(name.strip(), ratio) for name in names.split(",")]
    for config in configs:
        step.check_needs(config, workload)
    return configs


def _config(name: str, ratio: float) -> Any:
    from optimize.runs import recipe

    if name not in NAMES:
        raise UsageError(f"--method: there is no method {name!r}", fix=f"use one of {', '.join(NAMES)}")
    kind = NAMES[name]
    has_ratio = "ratio" in {entry.name for entry in fields(kind)}
    return recipe.build(kind, {"ratio": ratio} if has_ratio else {}, f"--method {name}")


def _step(config: Any) -> dict[str, Any]:
    """Return a config as a recipe spells it, without what is the default."""
    usual = type(config)()
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    return {
        "use": METHODS[type(config)].name,
        **{name: value for name, value in values.items() if value != getattr(usual, name)},
    }
