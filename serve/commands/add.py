"""`serve add`."""

import shlex
from pathlib import Path
from typing import Any, get_args

import click

from modelathe.commandline import PATH, emit, json_option, quiet_option, say
from modelathe.errors import BadInput, UsageError
from modelathe.interpreter import program
from modelathe.tensors import Dim
from serve.commands.versions import load_timeout_option, repository_option
from serve.config.settings import DESCRIPTIONS
from serve.config.target import Device, Runtime


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
@click.option("--device", type=click.Choice(get_args(Device)), help="Where it will run.")
@click.option("--runtime", type=click.Choice(get_args(Runtime)), help="What will run it there.")
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
    from serve.calls.add import add

    found = add(
        source,
        repository,
        name=name or "",
        dim=tuple(dims.values()),
        batch_axis=axis,
        settings=file,
        set=pairs,
        check=check,
        allow_nonfinite=allow_nonfinite,
        load_timeout=load_timeout,
        **target,
    )
    if as_json:
        emit(found.document)
        return
    click.echo(
        f"{found.state}: {found.model} version {found.number}" + (f", loaded at {found.url}" if found.url else "")
    )
    if check and found.untried:
        say(f"  {found.untried}")
    if found.state == "staged":
        where = shlex.quote(str(repository))
        click.echo(f"  {program('serve')} promote {found.model} {found.number} --repository {where}")
