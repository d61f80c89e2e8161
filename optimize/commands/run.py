"""`optimize run`: a recipe from the trained model to the proven endpoint."""

from pathlib import Path

import click

from loadtest.plan.options import Number
from modelathe.commandline import PATH, emit, json_option, quiet_option
from modelathe.errors import UsageError
from optimize.commands.options import overlap_option, preset_option, recipe_option


@click.command()
@click.argument("source")
@recipe_option
@preset_option
@click.option("--name", help="What the model is called in the repository.  [default: the workload's name]")
@click.option("--output", type=PATH, help="The run's folder.  [default: one of its own in build/runs/NAME]")
@click.option(
    "--repository", type=PATH, help="Publish a candidate into this model repository, after proof on a server."
)
@click.option("--promote", is_flag=True, help="Make it the live version, though another one is live.")
@click.option("--force", is_flag=True, help="Publish against the gates; the lineage says `forced` for ever.")
@click.option("--strict", is_flag=True, help="Judge the worse end of the 95 % interval, not the value.")
@overlap_option
@click.option(
    "--patience",
    type=Number(0),
    help="Seconds to measure speed for longer than usual, until the promise is decided.  [default: 100, or 20 where "
    "another preset is tried next]",
)
@click.option(
    "--allow-unmeasured",
    is_flag=True,
    help="Publish what is made for a GPU though there is none here to measure it; the lineage says so for ever.",
)
@click.option(
    "--track",
    metavar="mlflow[:URI]",
    help="Log parameters, figures, bundle and page to MLflow, at URI or where its own settings say.",
)
@click.option("--price", type=Number(0), help="Of this machine for an hour: the page says what a million samples cost.")
@quiet_option
@json_option
def run(
    source: str,
    recipe_path: Path | None,
    preset: str | None,
    name: str | None,
    output: Path | None,
    repository: Path | None,
    promote: bool,
    force: bool,
    strict: bool,
    allow_overlap: bool,
    patience: float | None,
    allow_unmeasured: bool,
    track: str | None,
    price: float | None,
    as_json: bool,
) -> None:
    """Run a recipe on SOURCE: path/to/file.py, with :function where it has several workloads, or a Hugging Face folder.

    What `optimize check` looks at on one batch comes first. A killed run resumes where it stopped: the same recipe,
    code and data find their folder again, and no run touches another's; `optimize runs` lists them. A gate that says
    no ends the run with exit code 3.

    Without --recipe and --preset it tries cpu-int8, where the workload has calibration data, and goes on with cpu-small
    where quality or speed is refused. Each is a run with a folder of its own; in --output, cpu-small's lies inside.

    Into a repository goes a candidate: it is compared with the version that is live, and `serve promote` makes it live.
    The first version of a model is live at once, also on a running `serve up`.

    \b
    Example:
      optimize run digits_cnn.py --recipe digits_cnn.toml --repository model_repository
      optimize run digits_cnn.py --preset cpu-small --name digits_small
    """
    from optimize.calls import run as calls
    from optimize.report import table
    from optimize.runs import follower, recipe
    from optimize.train import processes

    if promote and repository is None:
        raise UsageError("--promote: nothing is published", fix="name a --repository")
    if processes.rank():
        return follower.follow()
    result = calls.run(
        source,
        recipe.asked(recipe_path, preset),
        name=name,
        output=output,
        repository=repository,
        force=force,
        strict=strict,
        allow_overlap=allow_overlap,
        allow_unmeasured=allow_unmeasured,
        patience=patience,
        promote=promote,
        track=track,
        price=price,
    )
    if not as_json:
        table.run(result.document)
    result.check()
    if as_json:
        emit(result.document)
