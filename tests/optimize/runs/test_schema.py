"""The JSON Schema of recipes says of a file what reading it says."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from optimize.methods.table import NAMES
from optimize.model.errors import BadRecipe
from optimize.runs import recipe, schema

EXAMPLES = Path(__file__).parents[3] / "examples"
STEP = '[[step]]\nuse = "quantize.dynamic"\n'
WRONG = {
    "a key that is none": f"sed = 1\n{STEP}",
    "no step": "seed = 1\n",
    "a method that is none": '[[step]]\nuse = "quantize.dynamical"\n',
    "a step without a method": "[[step]]\nper_channel = true\n",
    "an option of another method": f"{STEP}epochs = 3\n",
    "a value that is none of those": '[target]\ndevice = "tpu"\n' + STEP,
    "a number out of range": "[load]\nduration = 0\n" + STEP,
    "a key that a table does not have": "[budget]\nkeeep = 0.9\n" + STEP,
    "a seed below 0": f"seed = -1\n{STEP}",
    "a sequence's setting that is none": '[serve.sequence]\nstrategy = "newest"\n' + STEP,
}


def errors(text: str) -> list[str]:
    checker = jsonschema.Draft202012Validator(schema.recipe())
    return [error.message for error in checker.iter_errors(tomllib.loads(text))]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_an_example_is_right_and_names_the_schema(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#:schema recipe.schema.json\n")
    assert not errors(text)
    written = recipe.load(path).document()
    assert not errors(recipe.load(path).toml()) and written


def test_the_schema_beside_the_examples_is_todays() -> None:
    done = subprocess.run([sys.executable, "-m", "optimize", "schema"], capture_output=True, text=True, check=True)
    assert (EXAMPLES / "recipe.schema.json").read_text() == done.stdout, "optimize schema --output writes it"
    jsonschema.Draft202012Validator.check_schema(json.loads(done.stdout))


@pytest.mark.parametrize("case", WRONG)
def test_what_a_recipe_may_not_hold_the_schema_refuses(case: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(WRONG[case])
    with pytest.raises(BadRecipe):
        recipe.load(tmp_path / "recipe.toml")
    assert errors(WRONG[case])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_may_stand_alone(name: str) -> None:
    assert not errors(f'[[step]]\nuse = "{name}"\n')


BASE = '[budget]\nkeep = 0.99\n[target]\ncores = 2\nbatch = [1]\n[[step]]\nuse = "quantize.static"\n'


def written(place: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (place / f"{name}.toml").write_text(text)
    return place / f"{next(iter(texts))}.toml"


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("", {}),
        ("seed = 3\n", {"seed": 3}),
        ("[target]\nbatch = [8]\n", {"target": {"batch": [8], "cores": 2}}),
        (STEP, {"step": ["quantize.dynamic"]}),
        ("[load]\nduration = 2.0\n", {"load": {"duration": 2.0}}),
    ],
)
def test_a_recipe_holds_what_differs_from_the_one_that_it_extends(
    text: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.toml").write_text(BASE)
    found = recipe.load(written(tmp_path, own=f'extends = "shared/base.toml"\n{text}')).document()
    wanted = recipe.parse(tomllib.loads(BASE)).document()
    for key, value in changed.items():
        if key == "step":
            assert [step["use"] for step in found["step"]] == ["export.onnx", *value]
        elif isinstance(value, dict):
            assert found[key] == wanted[key] | value
        else:
            assert found[key] == value
    assert {key: found[key] for key in wanted if key not in changed} == {
        key: value for key, value in wanted.items() if key not in changed
    }


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"one": 'extends = "one.toml"\n'}, "one.toml: extends itself"),
        ({"one": 'extends = "two.toml"\n', "two": 'extends = "one.toml"\n'}, "one.toml: extends itself"),
        ({"one": 'extends = "none.toml"\n'}, "none.toml: there is no such recipe"),
        ({"one": f"extends = 3\n{STEP}"}, "one.toml: extends is 3"),
        ({"one": 'extends = "two.toml"\nbudget = 3\n', "two": BASE}, r"one.toml, \[budget\]: is 3, not a table"),
        ({"one": 'extends = "two.toml"\n', "two": "[budget\n"}, "two.toml: is not TOML"),
    ],
)
def test_what_cannot_be_extended_is_said(texts: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=said):
        recipe.load(written(tmp_path, **texts))


def test_every_key_says_what_it_is() -> None:
    made = schema.recipe()
    tables = [made["properties"][name] for name in schema.TABLES] + list(made["$defs"].values())
    for table in tables:
        for name, told in table["properties"].items():
            assert told.get("description"), name
