"""`serve check`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelathe.commandline import document, emit, json_option, quiet_option, reporting, say
from modelathe.errors import UsageError
from serve.commands.versions import repository_option

if TYPE_CHECKING:
    from serve.repository.finding import Finding


@click.command()
@click.argument("model", required=False)
@repository_option
@click.option("--image", default="", help="Release of Triton that will serve it, as in 26.07 (default: ours).")
@click.option("--load/--no-load", default=True, help="Load it in a throw-away server, where the files are in order.")
@click.option("--strict", is_flag=True, help="Let warnings fail too.")
@quiet_option
@json_option
def check(model: str | None, repository: Path, image: str, load: bool, strict: bool, as_json: bool) -> None:
    """Say what is wrong with the repository, or with MODEL alone, one line for each finding.

    Looks at the files first and starts nothing. What is in order there is loaded in a throw-away server, which gets one
    request for each batch that the model is warmed up with. Ends with 4 if there is an error.

    \b
    Example:
      serve check --repository build/model_repository
    """
    from serve.config.errors import BadRepository
    from serve.repository import lint

    if image and not re.fullmatch(r"\d\d\.\d\d", image):
        raise UsageError(f"--image {image} is no release", fix="write it as in --image 26.07")
    if model and Path(model).is_dir() and not (repository / Path(model).name).is_dir():
        raise UsageError("is a folder, not the name of a model", where=model, fix=f"say --repository {model}")
    found = lint.check(repository, model, image)
    if load:
        with reporting() as report:
            found += _tried(repository, model, found, report)
    if not as_json:
        for finding in found:
            line = f"{finding.level}: {finding.model}: {finding.where}: {finding.what}; fix: {finding.fix}"
            say(" ".join(line.split()))
    faults = [finding for finding in found if strict or finding.level == "error"]
    result = {"findings": [finding.document() for finding in found]}
    if faults:
        count = f"{len(faults)} findings, the first" if len(faults) > 1 else "1 finding"
        failure = BadRepository(f"{count}: {faults[0].what}", where=faults[0].where, fix=faults[0].fix)
        failure.partial = result
        raise failure
    if as_json:
        emit(document(**result))
    else:
        click.echo("nothing is wrong" if not found else f"no errors; warnings: {len(found)}")


def _tried(
    repository: Path, model: str | None, found: "list[Finding]", report: Callable[[str, float], None]
) -> "list[Finding]":
    """Load each model whose files are in order; return what the server found."""
    from serve.repository import lint
    from serve.server import dryload

    broken = {finding.model for finding in found if finding.level == "error"}
    names = [name for name in lint.names(repository) if name not in broken and model in (None, name)]
    more = []
    for number, name in enumerate(names):
        report(f"loading: {name}", number / len(names))
        more += dryload.findings(repository, name)
    return more
