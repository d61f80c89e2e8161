"""Schema: what may stand in a recipe, for an editor that completes and checks it."""

import re
from typing import Any

from pydantic import TypeAdapter

from optimize.judge.budget import Budget
from optimize.methods.table import METHODS
from optimize.runs.recipe import EXTENDS, LARGEST_SEED, Load
from serve.config.settings import Settings
from serve.config.target import Target

ARGUMENT = re.compile(r"^    (\w+): (.+(?:\n        .+)*)", re.MULTILINE)
"""An argument and its text in a docstring."""
TABLES = {
    "budget": (Budget, "What the result must keep and may cost."),
    "target": (Target, "Where the result will run."),
    "load": (Load, "The load test at the endpoint."),
    "serve": (Settings, "How the result is served."),
}


def recipe() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a recipe, made from the dataclasses that read it."""
    inner: dict[str, Any] = {}
    tables = {name: {**_table(config, inner), "description": text} for name, (config, text) in TABLES.items()}
    steps = [_step(method.name, _table(config, inner)) for config, method in METHODS.items()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of modelathe",
        "type": "object",
        "properties": {
            EXTENDS: {
                "type": "string",
                "description": "Another recipe, or preset:NAME, of which this one holds what differs.",
            },
            "seed": {"type": "integer", "minimum": 0, "maximum": LARGEST_SEED, "default": 0},
            **tables,
            "step": {"type": "array", "minItems": 1, "items": {"oneOf": steps}},
        },
        "additionalProperties": False,
        "anyOf": [{"required": ["step"]}, {"required": [EXTENDS]}],
        "$defs": inner,
    }


def _step(name: str, table: dict[str, Any]) -> dict[str, Any]:
    return {**table, "properties": {"use": {"const": name}, **table["properties"]}, "required": ["use"]}


def _table(config: type, inner: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a config, and put those of the configs that it holds into `inner`."""
    made = TypeAdapter(config).json_schema()
    inner |= {name: _brief(value) for name, value in made.pop("$defs", {}).items()}
    return {"properties": {}, **_brief(made), "additionalProperties": False}


def _brief(made: dict[str, Any]) -> dict[str, Any]:
    """Return it with the first line of the docstring as its description, and what `Args` says as that of each key."""
    text = made.get("description", "")
    told = {name: " ".join(words.split()) for name, words in ARGUMENT.findall(text.partition("\nArgs:\n")[2])}
    keys = made.get("properties", {})
    said = {name: ({"description": told[name]} if name in told else {}) | key for name, key in keys.items()}
    return {**made, "description": text.partition("\n")[0], **({"properties": said} if keys else {})}
