"""Pages that are made when the site is built: commands from Click, recipes and methods from their dataclasses."""

import ast
import importlib
import inspect
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from modelathe.commandline import FORMAT
from optimize.methods.table import NAMES
from optimize.report import catalogue
from optimize.runs import schema

ROOMS = ("optimize", "serve", "loadtest")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those that are written by hand; MkDocs calls it."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the Markdown of each made page by its path in the site."""
    commands = {f"reference/{room}.md": "\n\n".join(_room(room)) for room in ROOMS}
    recipe, methods, python = map("\n\n".join, (_recipe(), _methods(), _python()))
    return {**commands, "reference/recipe.md": recipe, "reference/methods.md": methods, "reference/python.md": python}


def _room(room: str) -> Iterator[str]:
    main = importlib.import_module(f"{room}.cli").main
    yield f"# {room}\n\n{_prose(main.help or '')}"
    every = list(_below(room, main))
    rows = [[f"[`{name}`](#{name.replace(' ', '-')})", command.get_short_help_str(200)] for name, command in every]
    yield _table(["command", "what it does"], rows)
    for name, command in every:
        yield f"## {name}"
        with click.Context(command, info_name=name) as context:
            yield f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```"
            yield _prose(command.help or "")
            records = [found for option in command.params if (found := option.get_help_record(context))]
        yield _table(["option", "what it does"], [[f"`{flag}`", _cell(text)] for flag, text in records if text])


def _below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield each command below `command` that does something, by the words that call it."""
    for word, inner in command.commands.items() if isinstance(command, click.Group) else ():
        if isinstance(inner, click.Group):
            yield from _below(f"{name} {word}", inner)
        else:
            yield f"{name} {word}", inner


def _prose(text: str) -> str:
    """Return a help text as Markdown; what Click is told to leave as it is stays so."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"```text\n{part[2:]}\n```" if part.startswith("\b") else _plain(part) for part in parts)


def _plain(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", r"\*")


def _cell(text: str) -> str:
    return " ".join(_plain(text).replace("|", r"\|").replace("[", r"\[").split())


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recipe() -> Iterator[str]:
    made = schema.recipe()
    yield "# Recipes\n\nA recipe is a TOML file: what is done to the model, in order, and what may be lost."
    yield (
        "`optimize schema --output recipe.schema.json` writes the JSON Schema that this page is made from. A recipe "
        "whose first line is `#:schema recipe.schema.json` is completed and checked by editors that read TOML."
    )
    top = [[f"`{name}`", _cell(made["properties"][name].get("description", ""))] for name in made["properties"]]
    yield _table(["key", "what it is"], top)
    for name, (_, text) in schema.TABLES.items():
        yield f"## [{name}]\n\n{text}"
        yield _keys(made["properties"][name]["properties"])
    for name, table in made["$defs"].items():
        yield f"## {name}\n\n{_plain(table['description'])}"
        yield _keys(table["properties"]) if "properties" in table else ""
    yield "## [[step]]\n\n`use` names a method; its other keys are [that method's options](methods.md)."


def _keys(properties: dict[str, Any]) -> str:
    rows = []
    for name, told in properties.items():
        default = json.dumps(told["default"]) if told.get("default") is not None else ""
        rows.append([f"`{name}`", f"`{_kind(told)}`", f"`{default}`" if default else "", _cell(_said(told))])
    return _table(["key", "values", "default", "what it is"], rows).replace("``", "")


def _said(told: dict[str, Any]) -> str:
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "below"}
    kinds = [told, *told.get("anyOf", [])]
    bounds = [f"{words} {kind[key]:,.12g}" for kind in kinds for key, words in limits.items() if key in kind]
    return " ".join([told.get("description", ""), f"({', '.join(bounds)})" if bounds else ""])


def _kind(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(_kind(one) for one in told["anyOf"] if one.get("type") != "null")
    if "enum" in told or "const" in told:
        return " or ".join(json.dumps(value) for value in told.get("enum", [told.get("const")]))
    return str(told.get("$ref", "").rpartition("/")[2] or told.get("type", ""))


def _methods() -> Iterator[str]:
    yield "# Methods\n\n`optimize methods` prints this list, `optimize methods NAME` all of one."
    entries = [catalogue.entry(name) for name in NAMES]
    rows = [
        [f"[`{each['name']}`](#{_anchor(each['name'])})", _cell(each["what"]), ", ".join(each["needs"])]
        for each in entries
    ]
    yield _table(["method", "what it does", "needs"], rows)
    for each in entries:
        yield f"## {each['name']} {{ #{_anchor(each['name'])} }}\n\n{_plain(each['about'])}"
        yield f"Works on {catalogue.WORKS_ON[each['stage']]}."
        if each["promises"]:
            yield f"A recipe with it is refused unless the result is {' and '.join(each['promises'])}."
        if each["options"]:
            yield _table(["option", "default", "values", "what it is"], [_option(option) for option in each["options"]])


def _option(option: dict[str, Any]) -> list[str]:
    default = "" if option["default"] is None else f"`{json.dumps(option['default'])}`"
    return [f"`{option['name']}`", default, _cell(option["values"]), _cell(option["what"])]


def _anchor(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def _python() -> Iterator[str]:
    yield "# Python\n\nThe public names of each room. A name is imported when it is asked for."
    yield f"Every document that they return or write has `format`, now {FORMAT}; see [JSON documents](json.md)."
    for room in ROOMS:
        module = importlib.import_module(room)
        if names := getattr(module, "__all__", ()):
            places = _places(module)
            yield f"## {room}"
            yield from (f"::: {places[name]}.{name}" for name in names)
    yield "## Runs and the stand-in\n\nWhat the commands themselves call."
    for name in CALLS:
        yield f"::: {name}"


def _places(room: ModuleType) -> dict[str, str]:
    """Return where the names come from that a room imports for types alone; they are its public ones."""
    nodes = ast.walk(ast.parse(inspect.getsource(room)))
    imports = (node for node in nodes if isinstance(node, ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}


CALLS = (
    "optimize.runs.recipe.load",
    "optimize.source.load.load_workload",
    "optimize.runs.pipeline.run",
    "serve.clients.standin.answers.load",
    "serve.clients.standin.running.running",
)
"""Functions that a user may call and that no room has in its `__all__`."""
