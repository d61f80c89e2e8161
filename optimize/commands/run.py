"""`optimize run`: a recipe from the trained model to the proven endpoint."""

from pathlib import Path

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, emit, json_option, reporting
from optimize.commands.overlap import overlap_option


@click.command()
@click.argument("source")
@click.option("--recipe", "recipe_path", required=True, type=PATH, help="The recipe, a TOML file.")
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
@click.option("--price", type=Number(0), help="Of this machine for an hour: the page says what a million samples cost.")
@json_option
def run(
    source: str,
    recipe_path: Path,
    output: Path | None,
    repository: Path | None,
    force: bool,
    strict: bool,
    allow_overlap: bool,
    patience: float,
    allow_unmeasured: bool,
    price: float | None,
    as_json: bool,
) -> None:
    """Run a recipe on SOURCE, a workload such as path/to/file.py:function.

    A killed run resumes where it stopped. A gate that says no ends the run with exit code 3. A `serve up` over the
    repository loads what is published at once.

    \b
    Example:
      optimize run examples/digits_cnn.py:workload --recipe examples/digits_cnn.toml \\
        --repository build/model_repository
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
            result = pipeline.run(
                recipe.load(recipe_path),
                load_workload(source),
                output=output,
                repository=repository,
                terms=Terms(force, strict, allow_overlap, allow_unmeasured, patience, price),
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
