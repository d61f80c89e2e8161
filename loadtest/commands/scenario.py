"""`loadtest scenario`: what scenarios there are; `loadtest run --scenario` plays one."""

import click

from modelathe.commandline import CommandGroup, document, emit, json_option, say


@click.group(cls=CommandGroup)
def scenario() -> None:
    """List and show scenarios: phases of load and what they must show.

    \b
    Example:
      loadtest scenario list
    """


@scenario.command(name="list")
@json_option
def list_(as_json: bool) -> None:
    """List the scenarios that come with modelathe.

    \b
    Example:
      loadtest scenario list --json
    """
    from loadtest.scenario.scenario import find, load, shipped

    found = {name: load(find(name)).description for name in shipped()}
    if as_json:
        emit(document(scenarios=[{"name": name, "description": text} for name, text in found.items()]))
        return
    for name, text in found.items():
        say(f"{name:12} {text}", " " * 13)


@scenario.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the file of scenario NAME, to be copied and changed.

    \b
    Example:
      loadtest scenario show soak > mine.toml
    """
    from dataclasses import asdict

    from loadtest.scenario.scenario import find, load

    path = find(name)
    found = load(path)
    if as_json:
        emit(document(name=path.stem, **asdict(found)))
    else:
        click.echo(path.read_text(encoding="utf-8-sig").rstrip())
