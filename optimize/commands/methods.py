"""`optimize methods` and `optimize presets`: what can be done to a model, and recipes that come with modelathe."""

import difflib

import click

from modelathe.commandline import document, emit, json_option
from modelathe.errors import UsageError


@click.command()
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the compression methods, or tell all of the method NAME: its options, what it needs, the paper.

    \b
    Example:
      optimize methods quantize.static
    """
    from optimize.methods.table import NAMES
    from optimize.report import catalogue

    if name is not None and name not in NAMES:
        close = difflib.get_close_matches(name, list(NAMES), 1)
        fix = f"did you mean {close[0]}?" if close else "list them with: optimize methods"
        raise UsageError(f"there is no method {name!r}", fix=fix)
    found = [catalogue.entry(each) for each in ([name] if name else NAMES)]
    if as_json:
        emit(document(methods=found))
    elif name:
        catalogue.tell(found[0])
    else:
        catalogue.list_all(found)


@click.command()
@click.argument("name", required=False)
@json_option
def presets(name: str | None, as_json: bool) -> None:
    """List the recipes that come with modelathe, or print the one called NAME.

    `optimize init --preset NAME` writes it to a file to go on from; a recipe may also say extends = "preset:NAME" and
    hold what differs.

    \b
    Example:
      optimize presets cpu-int8
    """
    from optimize.report import catalogue
    from optimize.runs import recipe

    texts = {each: recipe.preset(each).read_text(encoding="utf-8") for each in ([name] if name else recipe.presets())}
    if as_json:
        emit(
            document(presets=[{"name": each, "recipe": recipe.load(recipe.preset(each)).document()} for each in texts])
        )
    elif name:
        click.echo(texts[name], nl=False)
    else:
        catalogue.list_presets(texts)
