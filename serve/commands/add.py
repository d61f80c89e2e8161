"""`serve add`."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from modelathe.commandline import PATH, document, emit, json_option, quiet_option, reporting, say
from modelathe.errors import BadInput, UsageError
from modelathe.interpreter import program
from modelathe.tensors import Dim
from serve.commands.versions import load_timeout_option, repository_option
from serve.config.settings import DESCRIPTIONS


def _dim(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, Dim]:
    """Read `NAME=SMALLEST,TYPICAL,LARGEST`."""
    found = {}
    for text in values:
        name, _, sizes = text.partition("=")
        try:
            least, typical, most = map(int, sizes.split(","))
        except ValueError:
            raise UsageError(f"--dim {text}: not three sizes", fix="say --dim NAME=SMALLEST,TYPICAL,LARGEST") from None
        try:
            found[name] = Dim(name, least, typical, most)
        except BadInput as error:
            raise UsageError(f"--dim {text}: {error.what}", fix="say --dim NAME=SMALLEST,TYPICAL,LARGEST") from None
    return found


def _batch(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise UsageError(f"--batch {text}: not batch sizes", fix="write them as in --batch 1,32") from None


# What `serve.config.settings` says of each setting is the help; they stand there and nowhere else.
SETTINGS = "\b\nSettings for --set KEY=VALUE, or for the [serve] table of --settings:\n" + "\n".join(
    f"  {name:15} {text}" for name, text in DESCRIPTIONS.items()
)


@click.command(epilog=SETTINGS)
@click.argument("source", type=PATH)
@click.option("--name", help="The model's name; needed where SOURCE is an ONNX file.")
@repository_option
@click.option("--dim", "dims", multiple=True, callback=_dim, help="NAME=SMALLEST,TYPICAL,LARGEST of a dim.")
@click.option("--batch-axis", "axis", default="", metavar="NAME|none", help="The file's name of the first dim, if any.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where it will run.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]),
    help="What will run it there.",
)
@click.option("--cores", type=click.IntRange(1), help="CPU cores that the server may use.")
@click.option("--batch", callback=_batch, help="Batch sizes that matter, as in 1,32.")
@click.option("--settings", "file", type=PATH, help="TOML file with a [serve] table.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="One setting; see below.")
@click.option("--check/--no-check", default=True, help="Load it in a throw-away server first.")
@click.option("--allow-nonfinite", is_flag=True, help="Let its answers hold NaN and infinity.")
@load_timeout_option
@quiet_option
@json_option
def add(
    source: Path,
    name: str | None,
    repository: Path,
    dims: dict[str, Dim],
    axis: str,
    file: Path | None,
    pairs: tuple[str, ...],
    check: bool,
    allow_nonfinite: bool,
    load_timeout: float,
    as_json: bool,
    **target: Any,
) -> None:
    """Put a model into the repository as its next version, once a throw-away server has loaded it.

    SOURCE is an ONNX file, a bundle of `optimize`, or REPOSITORY/MODEL/NUMBER, which keeps its lineage. The first
    version of a model is live at once, also on a running `serve up`; a later one waits for `serve promote`.

    Where the first dim of every input and output changes size, it is the batch axis: the throw-away server is asked
    whether a sample is answered in a batch as it is alone. A first dim that is time wants `--batch-axis none`.

    \b
    Example:
      serve add model.onnx --name classifier --set queue_delay_us=200
    """
    from serve.config import settings
    from serve.config.target import Target
    from serve.repository import source as sources
    from serve.repository import staging
    from serve.rollout import rollout
    from serve.server import dryload

    found = sources.load(source, dims, axis)
    model = name or found.name
    if not model:
        raise UsageError("the model needs a name", fix="say --name NAME")
    given = {key: value for key, value in target.items() if value is not None}
    try:
        made_for = replace(found.target or Target(), **given)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"--{wrong['loc'][0]}: {wrong['msg']}", fix="change that option") from None
    asked = settings.gather(file, pairs, found.settings)
    with (
        reporting() as report,
        staging.stage(repository, model, found, made_for, asked) as staged,
    ):
        untried = "" if check else "not tried: --no-check"
        if check:
            report("loading it in a throw-away server", 0.0)
            untried = dryload.staged(staged, nonfinite=allow_nonfinite)
        first = not (repository / model).exists()
        version = staging.publish(staged, dict(found.lineage))
    url = rollout.promote(repository, model, version.number, limit=load_timeout).url if first else None
    kind = "live" if first else "staged"
    if as_json:
        emit(document(model=model, number=version.number, state=kind, digest=version.digest, url=url, untried=untried))
        return
    click.echo(f"{kind}: {model} version {version.number}" + (f", loaded at {url}" if url else ""))
    if check and untried:
        say(f"  {untried}")
    if not first:
        where = shlex.quote(str(repository))
        click.echo(f"  {program('serve')} promote {model} {version.number} --repository {where}")
