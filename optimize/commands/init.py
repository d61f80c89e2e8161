"""`optimize init`: the files that one begins with."""

import shlex
from pathlib import Path

import click

from modelathe.commandline import PATH, document, emit, install_line, json_option
from modelathe.errors import UsageError
from modelathe.interpreter import program

EXAMPLES = ("digits_cnn",)


@click.command()
@click.argument("model", required=False)
@click.option("--example", type=click.Choice(EXAMPLES), help="Write an example that runs as it stands.")
@click.option("--preset", help="The recipe to begin with, as `optimize presets` lists them.")
@click.option("--output", type=PATH, default=Path(), show_default="the current folder", help="Where to write.")
@json_option
def init(model: str | None, example: str | None, preset: str | None, output: Path, as_json: bool) -> None:
    """Write a workload and a recipe to start from, for MODEL if given: file.py:Class or a Hugging Face folder.

    Nothing that is there is written over.

    \b
    Example:
      optimize init --example digits_cnn
      optimize init --preset cpu-small --output build/mine
    """
    from optimize.runs import start

    if example and (model or preset):
        what = "MODEL" if model else "--preset"
        raise UsageError(f"{what} and --example are both given", fix="give one of them")
    source, recipe = "workload.py:workload", "recipe.toml"
    if example:
        written = start.example(example, output)
        source, recipe = f"{example}.py:workload", f"{example}.toml"
    elif model and Path(model).suffix == ".onnx":
        name = f"serve add {shlex.quote(model)} --name NAME --repository model_repository"
        raise UsageError("an ONNX file can be served, not pruned or distilled", where=model, fix=name)
    elif model and (Path(model) / "config.json").is_file():
        written, source = start.only_recipe(output, preset), model
    else:
        place, _, name = (model or "").rpartition(":")
        written = start.blank(output, f"{place}:{name}", preset)
    places = [shlex.quote(str(output / name)) if name != model else shlex.quote(name) for name in (source, recipe)]
    line = f"{program('optimize')} run {places[0]} --recipe {places[1]}"
    if as_json:
        emit(document(written=[str(path) for path in written], next=line))
        return
    for path in written:
        click.echo(f"wrote {path}")
    if example:
        click.echo(f"it needs scikit-learn: {install_line('examples')}")
    click.echo(f"next: {line}" if example or source == model else f"fill in {output / 'workload.py'}, then: {line}")
