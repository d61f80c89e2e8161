"""`serve list`, `promote`, `rollback`, `remove` and `show`: the versions of a model."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from loadtest.plan.options import Duration
from modelathe.commandline import PATH, document, emit, json_option, quiet, say
from modelathe.errors import UsageError

if TYPE_CHECKING:
    from serve.rollout.rollout import Promoted

DEFAULT = Path("model_repository")
CREATE = ("add",)
"""Commands that make a repository where there is none."""


def meant(context: click.Context, _option: click.Parameter, named: Path | None) -> Path:
    """Return the repository that is named, else the one of the one server that runs, else `model_repository`.

    Raises:
        UsageError: it could be several.
        BadRepository: there is none of these.
    """
    from serve.config.errors import BadRepository
    from serve.server import state

    if named is not None or context.resilient_parsing:
        return named or DEFAULT
    running = state.everything()
    if any(one.repository == DEFAULT.resolve() for one in running):
        return DEFAULT
    if not running:
        if context.command.name in CREATE or DEFAULT.exists():
            return DEFAULT
        raise BadRepository(
            f"no repository is named, no `serve up` of yours runs, and there is no {DEFAULT} here",
            fix="say --repository with the folder that it was published to; to publish one: optimize run WORKLOAD "
            f"--repository {DEFAULT}, or serve add FILE.onnx --name NAME",
        )
    if len(running) > 1 or DEFAULT.is_dir():
        places = [f"{_near(one.repository)} (served at {one.name})" for one in running]
        places += [f"{DEFAULT} (not served)"] if DEFAULT.is_dir() else []
        raise UsageError("it could be several repositories", fix=f"say --repository; there are {', '.join(places)}")
    place = _near(running[0].repository)
    if not quiet():
        say(f"repository: {place}, served at {running[0].name}", err=True)
    return place


def _near(place: Path) -> Path:
    """Return a path as it looks from here, if it lies below."""
    here = Path.cwd()
    return place.relative_to(here) if place.is_relative_to(here) else place


repository_option = click.option(
    "--repository",
    type=PATH,
    callback=meant,
    help="The model repository.  [default: that of the `serve up` that runs, else model_repository]",
)
load_timeout_option = click.option(
    "--load-timeout",
    type=Duration(),
    default="120s",
    show_default=True,
    help="Time that a running server gets to load it.",
)


@click.command(name="list")
@repository_option
@json_option
def list_(repository: Path, as_json: bool) -> None:
    """List every version of every model, and which is live.

    \b
    Example:
      serve list --repository build/model_repository
    """
    from serve.repository import tree as repositories
    from serve.rollout import rollout

    found = {model: rollout.standings(repository, model) for model in repositories.models(repository)}
    if as_json:
        models = [
            {"name": model, "versions": [version.document() for version in versions]}
            for model, versions in found.items()
        ]
        emit(document(models=models))
        return
    for model, versions in found.items():
        for version in versions:
            click.echo(f"{model} {version.number}  {version.state:8}  {version.digest[:12] or 'no lineage'}")


@click.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@repository_option
@load_timeout_option
@json_option
def promote(model: str, version: int | None, repository: Path, load_timeout: float, as_json: bool) -> None:
    """Make VERSION of MODEL, or its newest, the one that is served.

    A running `serve up` over the repository loads it at once, also a model that is new to it, and answers with the
    version before until it is ready. A version that it cannot load does not replace the one that serves. The models of
    a pipeline that were published together are promoted together.

    \b
    Example:
      serve promote digits_cnn 2 --repository build/model_repository
    """
    from serve.rollout import rollout

    _tell(repository, model, rollout.promote(repository, model, version, limit=load_timeout), as_json)


@click.command()
@click.argument("model")
@repository_option
@load_timeout_option
@json_option
def rollback(model: str, repository: Path, load_timeout: float, as_json: bool) -> None:
    """Make the version of MODEL live again that was live last before the present one.

    \b
    Example:
      serve rollback digits_cnn --repository build/model_repository
    """
    from serve.rollout import rollout

    _tell(repository, model, rollout.roll_back(repository, model, limit=load_timeout), as_json)


@click.command()
@click.argument("model")
@click.option("--keep", type=click.IntRange(1), help="How many of the newest versions stay.")
@click.option("--all", "whole", is_flag=True, help="Delete the whole model; a running `serve up` unloads it.")
@repository_option
@json_option
def remove(model: str, keep: int | None, whole: bool, repository: Path, as_json: bool) -> None:
    """Delete old versions of MODEL; the live one stays, and the one that `serve rollback` would go back to.

    \b
    Example:
      serve remove digits_cnn --keep 3 --repository build/model_repository
    """
    from serve.rollout import rollout

    if whole == bool(keep):
        raise UsageError("one of --keep and --all says what goes", fix="say --keep N, or --all for the whole model")
    gone = rollout.remove(repository, model, keep) if keep else rollout.remove_model(repository, model)
    if as_json:
        emit(document(model=model, removed=gone))
    else:
        click.echo(f"removed: {', '.join(map(str, gone)) or 'nothing'}")


@click.command()
@click.argument("model")
@click.argument("version", type=click.IntRange(1), required=False)
@repository_option
@json_option
def show(model: str, version: int | None, repository: Path, as_json: bool) -> None:
    """Show how MODEL is served: its present configuration, or the one that VERSION would be served with.

    \b
    Example:
      serve show digits_cnn --repository build/model_repository
    """
    from google.protobuf import json_format

    from serve.config import describe, model_config
    from serve.repository import tree as repositories
    from serve.rollout import rollout

    rollout.standings(repository, model)
    if version is None:
        config = repositories.config(repository, model)
    else:
        number = rollout.known(repository, model, version)
        config = model_config.parse(repositories.read_lineage(repository, model, number)["config"])
    if as_json:
        emit(document(model=model, config=json_format.MessageToDict(config, preserving_proto_field_name=True)))
        return
    click.echo(model)
    for heading, text in describe.lines(config):
        say(f"  {heading:14} {text}", " " * 17)


def _tell(repository: Path, model: str, promoted: "Promoted", as_json: bool) -> None:
    from serve.rollout import rollout

    parts = rollout.together(repository, model, promoted.number)
    if as_json:
        emit(document(model=model, live=promoted.number, parts=parts, url=promoted.url))
        return
    for name, one in parts.items():
        click.echo(
            f"live: {name} version {one}, " + (f"loaded at {promoted.url}" if promoted.url else "no server runs")
        )
