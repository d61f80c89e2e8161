"""`optimize run`: a recipe from the trained model to the proven endpoint."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, emit, json_option, reporting
from modelathe.errors import BadInput, UsageError
from optimize.commands.options import overlap_option, preset_option, recipe_option

if TYPE_CHECKING:
    from optimize.source.workload import Workload


@click.command()
@click.argument("source")
@recipe_option
@preset_option
@click.option("--name", help="What the model is called in the repository.  [default: the workload's name]")
@click.option("--output", type=PATH, help="The run's folder.  [default: build/runs/NAME]")
@click.option("--repository", type=PATH, help="Publish into this model repository, after proof on a server.")
@click.option("--force", is_flag=True, help="Publish against the gates; the lineage says `forced` for ever.")
@click.option("--strict", is_flag=True, help="Judge the worse end of the 95 % interval, not the value.")
@overlap_option
@click.option(
    "--patience",
    type=Number(0),
    default=100.0,
    show_default=True,
    help="Seconds to measure speed for longer than usual, until the promise is decided.",
)
@click.option(
    "--allow-unmeasured",
    is_flag=True,
    help="Publish what is made for a GPU though there is none here to measure it; the lineage says so for ever.",
)
@json_option
def run(
    source: str,
    recipe_path: Path | None,
    preset: str | None,
    name: str | None,
    output: Path | None,
    repository: Path | None,
    force: bool,
    strict: bool,
    allow_overlap: bool,
    patience: float,
    allow_unmeasured: bool,
    as_json: bool,
) -> None:
    """Run a recipe on SOURCE: path/to/file.py, with :function where it has several workloads, or a Hugging Face folder.

    What `optimize check` looks at on one batch comes first. A killed run resumes where it stopped. A gate that says no
    ends the run with exit code 3. A `serve up` over the repository loads what is published at once.

    \b
    Example:
      optimize run digits_cnn.py --recipe digits_cnn.toml --repository model_repository
      optimize run digits_cnn.py --preset cpu-small --name digits_small
    """
    from optimize.model.errors import BusyMachine, GateRefused
    from optimize.report import table
    from optimize.runs import follower, pipeline, recipe
    from optimize.runs.run import Terms
    from optimize.source.load import load_workload
    from optimize.train import processes

    if processes.rank():
        return follower.follow()
    try:
        with follower.leading(), reporting() as progress:
            workload = load_workload(source)
            plan = recipe.chosen(recipe_path, preset, workload, progress)
            result = pipeline.run(
                plan,
                _named(workload, name) if name else workload,
                output=output,
                repository=repository,
                terms=Terms(force, strict, allow_overlap, allow_unmeasured, patience),
                progress=progress,
            )
    except (BusyMachine, GateRefused) as refusal:
        if not as_json and refusal.partial:
            table.run(refusal.partial)
        raise
    if as_json:
        emit(result)
    else:
        table.run(result)


def _named(workload: "Workload", name: str) -> "Workload":
    """Return the workload under another name.

    Raises:
        UsageError: it cannot name a model.
    """
    try:
        return replace(workload, name=name)
    except BadInput as error:
        raise UsageError(error.what, where="--name", fix=error.fix) from error
