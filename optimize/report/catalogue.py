"""Catalogue: what each method says of itself, read from its config and its module."""

import importlib
import inspect
import itertools
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from rich import box

from loadtest.record.table import Unbroken
from optimize.methods.table import METHODS, NAMES
from optimize.report.table import terminal

WORKS_ON = {"torch": "the torch model", "export": "the way to ONNX", "graph": "the ONNX file"}


def entry(name: str) -> dict[str, Any]:
    """Return what the method `name` does, works on, needs with its defaults, promises, and can be told."""
    config = NAMES[name]
    method = METHODS[config]
    return {
        "name": name,
        "what": (config.__doc__ or "").partition("\n")[0],
        "about": inspect.getdoc(importlib.import_module(config.__module__)) or "",
        "stage": method.stage,
        "needs": list(method.needs(config())),
        "promises": sorted(method.promises),
        "options": _options(config),
    }


def list_all(entries: list[dict[str, Any]]) -> None:
    """Print one row for each method."""
    table = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False, spare=["needs"])
    for title in ("method", "what it does", "needs"):
        table.add_column(title, no_wrap=title == "method")
    for found in entries:
        table.add_row(found["name"], found["what"], ", ".join(found["needs"]))
    console = terminal()
    console.print(table)
    console.print("all of one: optimize methods NAME")


def list_presets(texts: Mapping[str, str]) -> None:
    """Print what each preset says of itself in the comment that it begins with.

    Args:
        texts: of the recipes, by name.
    """
    table = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("preset", "what it is for"):
        table.add_column(title, no_wrap=title == "preset")
    for name, text in texts.items():
        comments = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
        table.add_row(name, " ".join(line.removeprefix("#").strip() for line in comments))
    console = terminal()
    console.print(table)
    console.print("one as TOML: optimize presets NAME; as a file: optimize init --preset NAME")


def tell(found: dict[str, Any]) -> None:
    """Print all of one method."""
    console = terminal()
    console.print(found["about"], markup=False)
    console.print(f"\nWorks on {WORKS_ON[found['stage']]}.")
    if found["needs"]:
        console.print(f"Needs of the workload: {', '.join(found['needs'])}.")
    if found["promises"]:
        console.print(f"A recipe with it is refused unless the result is {' and '.join(found['promises'])}.")
    table = Unbroken(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("option", "default", "values", "what it is"):
        table.add_column(title)
    for option in found["options"]:
        default = "" if option["default"] is None else json.dumps(option["default"])
        table.add_row(option["name"], default, option["values"], option["what"])
    if found["options"]:
        console.print(table)


def _options(config: type) -> list[dict[str, Any]]:
    hints, found = get_type_hints(config), []
    for field in fields(config):
        told = field.default if isinstance(field.default, FieldInfo) else FieldInfo(default=field.default)
        option = {"name": field.name, "default": told.default, "values": _values(hints[field.name])}
        found.append({**option, "what": told.description or ""})
    return found


def _values(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return "a list"
    if args := [arg for arg in get_args(hint) if arg is not type(None)]:
        return " | ".join(_values(arg) if isinstance(arg, type) else str(arg) for arg in args)
    return {bool: "true | false", int: "a whole number", float: "a number", str: "text"}.get(hint, str(hint))
