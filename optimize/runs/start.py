"""Start: the files that one begins with, a workload, a recipe and its schema, written beside each other."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from modelathe import files
from modelathe.errors import UsageError
from optimize.runs import recipe as recipes
from optimize.runs import schema

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA = "recipe.schema.json"


def example(name: str, folder: Path) -> list[Path]:
    """Write an example that comes with modelathe: its workload, weights and recipe.

    Raises:
        UsageError: one of the files is there already.
    """
    # A wheel holds it among the templates, a checkout with the other examples.
    place = TEMPLATES if (TEMPLATES / f"{name}.py").exists() else Path(__file__).parents[2] / "examples"
    return _write(
        folder, {f"{name}{kind}": (place / f"{name}{kind}").read_bytes() for kind in (".py", ".safetensors", ".toml")}
    )


def blank(folder: Path, model: str = ":", preset: str | None = None) -> list[Path]:
    """Write a workload to be filled in, for the class `file.py:Class` or `module:Class`, and a recipe.

    Raises:
        UsageError: one of the files is there already.
        BadRecipe: there is no such preset.
    """
    place, _, name = model.rpartition(":")
    module = place.removesuffix(".py").replace("/", ".") or "mine"
    called = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name or "model").lower()
    text = (TEMPLATES / "workload.py.txt").read_text().format(module=module, name=name or "Model", model=called)
    return _write(folder, {"workload.py": text.encode(), **recipe(preset)})


def recipe(preset: str | None = None) -> dict[str, bytes]:
    """Return the file that holds a recipe to begin with: a preset, or one with a word for each line."""
    if preset is None:
        return {"recipe.toml": (TEMPLATES / "recipe.toml").read_bytes()}
    return {"recipe.toml": f"#:schema {SCHEMA}\n".encode() + recipes.preset(preset).read_bytes()}


def only_recipe(folder: Path, preset: str | None = None) -> list[Path]:
    """Write a recipe, for what is a workload as it stands.

    Raises:
        UsageError: it is there already.
        BadRecipe: there is no such preset.
    """
    return _write(folder, recipe(preset))


def _write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    whole = {**contents, SCHEMA: (json.dumps(schema.recipe(), indent=2) + "\n").encode()}
    if there := [name for name in whole if (folder / name).exists() and (folder / name).read_bytes() != whole[name]]:
        raise UsageError("is there already", where=str(folder / there[0]), fix="move it away, or give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    return [files.write(folder / name, content) for name, content in whole.items()]
