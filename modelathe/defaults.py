"""Defaults: what a project states once for the options of its commands, in the pyproject.toml of the current folder.

    [tool.modelathe.serve.up]
    http-port = 9000

An option on the command line goes before the environment variable of its name, here `SERVE_UP_HTTP_PORT`, that before
the file, and the file before the default that `--help` tells. What loosens a proof (`--force`, `--allow-…`,
`--no-check`) is said on the command line each time, and nowhere else.
"""

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from modelathe.errors import BadInput, ModelatheError, UsageError, closest

FILE = Path("pyproject.toml")
_ATTRIBUTED = "names_where_values_come_from"
LOOSENING = ("--allow-", "--force", "--no-check")


def read(room: click.Group) -> dict[str, Any]:
    """Return the defaults for the commands of a room by their names and those of their parameters, as Click takes them.

    Raises:
        UsageError: the file is not TOML, or names a command or an option that there is none of.
    """
    try:
        document = tomllib.loads(FILE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(FILE), fix="mend it, or run elsewhere") from error
    table = document.get("tool", {}).get("modelathe", {}).get(room.name, {})
    return _of(room, table, f"tool.modelathe.{room.name}")


def guard(command: click.Command) -> None:
    """Let no environment variable give an option of a command, or of those below it, that loosens a proof."""
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        guard(inner)
    for option in command.params:
        if isinstance(option, click.Option) and _loosens(option):
            option.allow_from_autoenv = False


def attribute(command: click.Command) -> None:
    """Make errors about an option of a command, or of those below it, name the file or variable that it came from."""
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        attribute(inner)
    named: list[click.Command | click.Parameter] = [command, *command.params]
    for one in named:
        if one.callback is not None and not hasattr(one.callback, _ATTRIBUTED):
            one.callback = _attributed(one.callback)


def origin(context: click.Context, option: click.Parameter) -> str:
    """Return the file or variable that an option's value came from; empty where the command line or no one said it."""
    name = str(option.name)
    said = context.get_parameter_source(name)
    if said == ParameterSource.ENVIRONMENT:
        return f"the environment variable {context.auto_envvar_prefix}_{name.upper()}"
    if said == ParameterSource.DEFAULT_MAP:
        return f"{FILE}, {name.replace('_', '-')} of {context.command.name}"
    return ""


def _attributed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **values: Any) -> Any:
        try:
            return function(*args, **values)
        except (UsageError, BadInput) as error:
            error.attribute(_origins(error, args))
            raise

    setattr(call, _ATTRIBUTED, True)
    return call


def _origins(error: ModelatheError, args: Sequence[Any]) -> list[str]:
    """Return where the values came from that an error is about: that of the option which is read, or those it names."""
    context = click.get_current_context()
    words = {word.strip("'\",:;()") for word in error.format_message().split()}
    about = [one for one in args if isinstance(one, click.Parameter)]
    for option in () if about else context.command.params:
        if words & {*option.opts, str(context.params.get(str(option.name)))}:
            about.append(option)
    return [place for option in about if (place := origin(context, option))]


def _loosens(option: click.Option) -> bool:
    return any(name.startswith(LOOSENING) for name in (*option.opts, *option.secondary_opts))


def _of(command: click.Command, table: object, where: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} is {table!r}, not a table", where=str(FILE), fix=f"write [{where}] and its keys")
    if isinstance(command, click.Group):
        return {
            name: _of(command.commands[_known(name, [*command.commands], where)], value, f"{where}.{name}")
            for name, value in table.items()
        }
    options = {
        name.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and (option.allow_from_autoenv or _loosens(option))
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }
    found: dict[str, Any] = {}
    for name, value in table.items():
        option = options[_known(name, [*options], where)]
        if _loosens(option):
            raise UsageError(f"{name} loosens a proof", where=f"{FILE}, {where}", fix="say it on the command line")
        off = f"--{name}" in option.secondary_opts
        found[str(option.name)] = not value if off else value
    return found


def _known(name: str, names: list[str], where: str) -> str:
    if name in names:
        return name
    fix = closest(name, names).strip() or f"use one of {', '.join(names)}"
    raise UsageError(f"unknown key {name!r} in [{where}]", where=str(FILE), fix=fix)
