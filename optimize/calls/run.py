"""`optimize.run`, which the command `optimize run` calls too."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from loadtest.calls import keywords
from modelathe.commandline import reporting
from modelathe.errors import BadInput, UsageError
from optimize.calls.results import RunResult
from optimize.model.errors import BusyMachine, GateRefused
from optimize.report import tracking
from optimize.runs import follower, pipeline
from optimize.runs import open as sources
from optimize.runs import recipe as recipes
from optimize.runs.recipe import Recipe
from optimize.runs.run import Terms
from optimize.source.workload import Workload


class Options(TypedDict, total=False):
    """The model's name in the repository, the tracker, and the fields of `optimize.runs.run.Terms`."""

    name: str | None
    track: str | None
    force: bool
    strict: bool
    allow_overlap: bool
    allow_unmeasured: bool
    patience: float | None
    promote: bool
    price: float | None


def run(
    workload: Workload | str | os.PathLike[str],
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    repository: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **options: Unpack[Options],
) -> RunResult:
    """Run a recipe on a workload, from the trained model to the proven endpoint.

    A gate that says no is an answer: the result is returned, with `passed` False and what to do in `gates`, and nothing
    was published. So it is where the machine was too busy for a gate to judge. `optimize.run(…).check()` raises instead
    what the command would have ended with.

    Args:
        workload: a Workload, `path/to/file.py:function`, `package.module:function` or a Hugging Face folder. A Workload
            that was made in a program or a notebook has no file that another run could compare with: each run makes
            every step of it anew.
        recipe: a mapping with the keys of a recipe's file, such as `{"step": [{"use": "quantize.static"}]}`, a Recipe,
            or the path of a TOML file, or `preset:NAME`; without it presets for a CPU, in turn: `cpu-int8` where there
            is calibration data, and `cpu-small` where quality or speed is refused. `document` says which were `tried`.
        output: the run's folder; one of its own in `build/runs/NAME` unless given. A preset that is tried after another
            has one of its name in it.
        repository: publish into this model repository, after proof on a real server, as a candidate if a version of the
            model is live.
        quiet: say nothing while it goes on.
        options: those of the command of these names: `name`, `track`, `force`, `strict`, `allow_overlap`,
            `allow_unmeasured`, `promote`, `price` of the machine for an hour, and `patience` in seconds.

    Returns:
        What was made and judged. In a notebook it shows the figures at the head of the proof page.

    Raises:
        BadInput: recipe, workload, model, data or repository; its class is one of `optimize.model.errors`.
    """
    keywords.check(options, Options.__annotations__)
    terms: dict[str, Any] = {**options}
    name, track = terms.pop("name", None), terms.pop("track", None)
    uri = None if track is None else tracking.parse(track)
    failure: GateRefused | BusyMachine | None = None
    with follower.leading(), reporting(quiet) as progress:
        opened = sources.workload(workload)
        if name:
            opened = _named(opened, name)
        plans = recipes.chosen(recipe, opened, progress)
        try:
            with tracking.tracked(uri, opened.name, opened.source) as kept:
                document = pipeline.run(
                    plans,
                    opened,
                    output=None if output is None else Path(output),
                    repository=None if repository is None else Path(repository),
                    terms=Terms(**terms),
                    progress=progress,
                )
                kept(document)
        except (GateRefused, BusyMachine) as refusal:
            if not refusal.partial:
                raise
            document, failure = refusal.partial, refusal
    return RunResult.of(document, opened, failure)


def _named(workload: Workload, name: str) -> Workload:
    """Return the workload under another name.

    Raises:
        UsageError: it cannot name a model.
    """
    try:
        return replace(workload, name=name)
    except BadInput as error:
        raise UsageError(error.what, where="--name", fix=error.fix) from error
