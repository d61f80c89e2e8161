"""`optimize init`: what it writes is there, is right, and is nobody else's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optimize.runs import recipe, start
from optimize.source.load import load_workload


def init(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "optimize", "init", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_an_example_runs_as_it_stands(tmp_path: Path) -> None:
    done = init("--example", "digits_cnn", "--output", "digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "next: optimize run digits/digits_cnn.py:workload --recipe digits/digits_cnn.toml" in done.stdout
    plan = recipe.load(tmp_path / "digits" / "digits_cnn.toml")
    made = load_workload(f"{tmp_path / 'digits' / 'digits_cnn.py'}:workload")
    assert len(plan.steps) == 5
    assert next(made.batches("evaluation")).inputs["image"].shape == (60, 1, 28, 28)
    assert made.build()
    assert json.loads((tmp_path / "digits" / start.SCHEMA).read_text())["title"]


def test_a_workload_to_be_filled_in_names_the_class(tmp_path: Path) -> None:
    (tmp_path / "tiny_nets.py").write_text(
        "from torch import nn\nclass TinyNet(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n"
    )
    done = init("tiny_nets.py:TinyNet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fill in workload.py, then: optimize run workload.py:workload --recipe recipe.toml" in done.stdout
    text = (tmp_path / "workload.py").read_text()
    assert "from tiny_nets import TinyNet" in text and 'name="tiny_net"' in text
    rows = "    rows = np.random.default_rng({}).random((64, 4))\n    return [(rows, rows.argmax(1) % 3)]"
    missing = ("the evaluation data: a DataLoader, or a list of (x, y)", "some of the training data")
    for seed, what in enumerate(missing):
        line = f'raise NotImplementedError("return {what}")'
        assert line in text
        text = text.replace(f"    {line}", rows.format(seed))
    (tmp_path / "workload.py").write_text(text.replace("from optimize", "import numpy as np\nfrom optimize", 1))
    made = load_workload(f"{tmp_path / 'workload.py'}:workload")
    assert made.name == "tiny_net" and made.inputs[0].own == (4,)
    assert recipe.load(tmp_path / "recipe.toml").steps


def test_nothing_is_written_over(tmp_path: Path) -> None:
    assert init(cwd=tmp_path).returncode == 0
    assert init(cwd=tmp_path).returncode == 0, "what is the same may stay"
    (tmp_path / "recipe.toml").write_text("mine")
    (tmp_path / "workload.py").unlink()
    done = init(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "recipe.toml: is there already" in done.stderr
    assert not (tmp_path / "workload.py").exists() and (tmp_path / "recipe.toml").read_text() == "mine"


def test_a_folder_is_a_workload_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text("{}")
    done = init("bert", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["next"] == "optimize run bert --recipe recipe.toml"
    assert not (tmp_path / "workload.py").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.onnx",), "an ONNX file can be served, not pruned or distilled\n  fix: serve add model.onnx"),
        (("x.py:Net", "--example", "digits_cnn"), "MODEL and --example are both given"),
        (("--preset", "cpu-int8", "--example", "digits_cnn"), "--preset and --example are both given"),
        (("--preset", "cpu-int"), "there is no preset 'cpu-int'\n  fix: did you mean 'cpu-int8'?"),
    ],
)
def test_what_cannot_be_begun_is_said(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = init(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", recipe.presets())
def test_a_preset_is_a_recipe_to_go_on_from(name: str, tmp_path: Path) -> None:
    plan = recipe.load(recipe.preset(name))
    assert plan.target.device == ("cuda" if name.startswith("gpu") else "cpu")
    assert init("--preset", name, cwd=tmp_path).returncode == 0
    assert recipe.load(tmp_path / "recipe.toml") == plan
    (tmp_path / "mine.toml").write_text(f'extends = "preset:{name}"\n[budget]\nkeep = 0.5\n')
    mine = recipe.load(tmp_path / "mine.toml")
    assert (mine.steps, mine.budget.keep) == (plan.steps, 0.5)


def test_the_presets_that_the_help_names_are_those_that_there_are() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "optimize", "run", "--help"], capture_output=True, text=True)
    for name in recipe.presets():
        assert name in " ".join(done.stdout.split())
