"""What a hurried user does wrong: each ends in one clear line, the right exit code, and nothing left behind."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optimize.model.errors import BadBundle
from optimize.runs import baseline
from optimize.source.load import load_workload
from optimize.step import bundle as bundles
from optimize.step.key import Key
from serve.repository import scratch
from tests.optimize.conftest import SMALL, Ended, Optimize

UserFile = Callable[..., str]
SOURCE = f"{SMALL}:workload"
UNTRAINED = ("    small.load_state_dict(weights())\n", "")
WORKLOAD = "    return Workload("
FORWARD = "        x = functional"
RETURNS = "return self.out(self.wide(self.hidden(x.flatten(1)).relu()).relu())"
ACCURACY = 'return {"accuracy": right.astype(float)'
INPUTS = '{"image": images[start : start + size]}'
STEP = "[[step]]\nuse = 'prune.channels'\n"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Temporary files go to a folder of the test's own, which must be empty in the end."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert not list(place.glob("modelathe-*"))
    assert not list(tmp_path.glob(".*"))


def one_error(ended: Ended, code: int, said: str) -> None:
    assert ended.code == code, ended.err
    error = json.loads(ended.out)["error"]
    assert set(error) == {"kind", "what", "where", "fix", "exit"}
    assert error["exit"] == code
    assert error["fix"]
    assert said in f"{error['where']}: {error['what']}"


USER_FILES: dict[str, tuple[tuple[str, str], int, str]] = {
    "exits at import": (("def workload", "import sys; sys.exit(0)\ndef workload"), 4, "raised SystemExit: 0"),
    "exits in workload()": ((WORKLOAD, f"    raise SystemExit(3)\n{WORKLOAD}"), 4, "workload() raised SystemExit"),
    "exits in model()": (("    small = Small()\n    return", "    exit()\n    return"), 4, "model() raised SystemExit"),
    "exits in forward": ((FORWARD, f"        raise SystemExit(3)\n{FORWARD}"), 4, "SystemExit: 3"),
    "exits in scores": (("    right = ", "    raise SystemExit(3)\n    right = "), 4, "scores() raised SystemExit"),
    "interrupts": (("def workload", "raise KeyboardInterrupt\ndef workload"), 130, "interrupted"),
    "never ends": (("def workload", "def f(): f()\nf()\ndef workload"), 4, "RecursionError"),
    "ends early": (("def workload", "raise EOFError('cut off')\ndef workload"), 4, "EOFError: cut off"),
    "crashes on some data": ((FORWARD, f"        1 / (image.mean() > 9).item()\n{FORWARD}"), 4, "ZeroDivisionError"),
    "outputs is a text": (('outputs=("logits",)', 'outputs="logits"'), 4, "not a tuple"),
    "name is no name": (('name="small"', 'name="-small"'), 4, "cannot name a model"),
    "model is a text": (("model=model", 'model="x"'), 4, "model() raised TypeError"),
    "model returns a tuple": ((RETURNS, "return x, x"), 4, "returns 2 unnamed tensors"),
    "model returns a dict": ((RETURNS, "return {'a': x}"), 4, "returns a dict with ['a']"),
    "model returns nothing": ((RETURNS, "pass"), 4, "returns NoneType"),
    "an input not taken": (
        ("image: torch.Tensor) ->", "picture: torch.Tensor, mask: torch.Tensor) ->"),
        4,
        "unexpected keyword argument",
    ),
    "NaN in the data": (("IMAGES = (IMAGES", "IMAGES[1600, 3] = np.nan\nIMAGES = (IMAGES"), 4, "NaN or infinite value"),
    "NaN in the weights": (
        ("    small = Small()\n    return", "    small = Small()\n    small.out.bias.data[0] = torch.nan\n    return"),
        4,
        "output 'logits' has NaN",
    ),
    "lists for arrays": ((INPUTS, '{"image": images.tolist()}'), 4, "not a mapping of numpy arrays"),
    "a tuple for inputs": ((INPUTS, "(images,)"), 4, "not a mapping of numpy arrays"),
    "an empty batch": ((INPUTS, '{"image": images[:0]}'), 4, "has no samples"),
    "targets of two kinds": (("labels[start : start + size])", "None if start else labels)"), 4, "is not an array"),
    "data is a list": (("evaluation=lambda: batches(TEST)", "evaluation=[]"), 4, "evaluation() raised TypeError"),
    "scores are words": ((ACCURACY, 'return {"accuracy": ["a"]'), 4, "gave 'accuracy' the shape (1,)"),
    "scores are ragged": ((ACCURACY, 'return {"accuracy": [[1], [1, 2]]'), 4, "scores() raised ValueError"),
    "scores are one number": ((ACCURACY, 'return {"accuracy": right.mean()'), 4, "the shape ()"),
    "aggregate raises": (("bounded=True", "aggregate=lambda scores: 1 / 0"), 4, "aggregate() raised"),
    "aggregate is NaN": (("bounded=True", "aggregate=lambda scores: float('nan')"), 4, "is not finite"),
}


@pytest.mark.parametrize("name", USER_FILES)
def test_a_bad_user_file(name: str, user_file: UserFile, optimize: Optimize) -> None:
    change, code, said = USER_FILES[name]
    one_error(optimize("evaluate", user_file(UNTRAINED, change), "--json"), code, said)


def test_a_users_prints_dataclasses_and_neighbours_are_welcome(
    user_file: UserFile, optimize: Optimize, tmp_path: Path
) -> None:
    (tmp_path / "beside_user.py").write_text("ONE = 1\n")
    source = user_file(
        UNTRAINED,
        ("import functools", "from __future__ import annotations\nimport dataclasses, functools, beside_user"),
        ("def workload", "print('hello')\n@dataclasses.dataclass\nclass Kept:\n    one: int = 1\ndef workload"),
    )
    ended = optimize("evaluate", source, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["predictor"] == "torch"
    assert "hello" in ended.err


SOURCES = {
    "": "there is no such file or module",
    "no_such_module": "there is no such module",
    "no/such/file.py:workload": "there is no such file",
    "no/such/folder": "there is no such file or module",
    f"{SMALL}:nothing": "there is no 'nothing'",
    f"{SMALL.parent}:workload": "there is no such file or module",
    f"{SMALL.with_suffix('.toml')}:workload": "there is no such file or module",
    "/dev/null:workload": "is not a Python file",
    "sys:exit": "exit() raised SystemExit",
    "os:getcwd": "returned str, not a Workload",
    f"{'x' * 300}.py:workload": "File name too long",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_none(source: str, optimize: Optimize, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(STEP)
    output = tmp_path / "run"
    ended = optimize("run", source, "--recipe", recipe, "--output", output, "--json")
    one_error(ended, 4, SOURCES[source])
    assert not output.exists()


RECIPES = {
    f"[target]\nbatch = [0]\n{STEP}": "batch.0 = 0",
    f"[target]\nbatch = [-1]\n{STEP}": "batch.0 = -1",
    f"[target]\nbatch = [10000000]\n{STEP}": "batch.0 = 10000000",
    f"[target]\ncores = 100000\n{STEP}": "cores = 100000",
    f"[load]\nduration = inf\n{STEP}": "duration = inf",
    f"[load]\nconcurrency = 10000000\n{STEP}": "concurrency = 10000000",
    f"[load]\nrate = 1e12\n{STEP}": "rate = 1000000000000",
    f"[budget]\nmax_drop = nan\n{STEP}": "max_drop = nan",
    f"{STEP}ratio = nan\n": "ratio = nan",
}


@pytest.mark.parametrize("text", RECIPES)
def test_absurd_numbers_in_a_recipe(text: str, optimize: Optimize, tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(text)
    one_error(optimize("run", SOURCE, "--recipe", recipe, "--output", output, "--json"), 2, RECIPES[text])
    assert not output.exists()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("none.toml", None),
        ("recipe.toml/x", b""),
        ("recipe.toml", b"\xff\xfe"),
        ("recipe.toml", b""),
        ("x" * 300, None),
    ],
)
def test_a_recipe_that_is_none(path: str, content: bytes | None, optimize: Optimize, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "recipe.toml").write_bytes(content)
    one_error(optimize("run", SOURCE, "--recipe", tmp_path / path, "--json"), 2, path)


def test_an_output_that_is_something_else(optimize: Optimize, tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "folder"
    recipe.write_text(f"[target]\nbatch = [1]\n{STEP}")
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for output, code in ((recipe, 2), (folder, 2), (recipe / "run", 4)):
        one_error(optimize("run", SOURCE, "--recipe", recipe, "--output", output, "--json"), code, str(output.name))
    assert (folder / "mine.txt").read_text() == "mine"


def test_one_run_at_a_time_in_a_folder(optimize: Optimize, tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(STEP)
    folder.mkdir()
    with scratch.locked(folder):
        ended = optimize("run", SOURCE, "--recipe", recipe, "--output", folder, "--json")
    one_error(ended, 5, "another command works in this folder")


def test_a_damaged_step_of_a_run_is_made_again(user_file: UserFile, tmp_path: Path) -> None:
    workload = load_workload(user_file(UNTRAINED))
    folder = tmp_path / "1-step"
    bundles.save(bundles.Bundle(workload, workload.build()), folder)
    assert baseline.reusable(folder, workload, Key()) is not None
    for damage in (lambda: (folder / bundles.WEIGHTS).write_bytes(b""), (folder / bundles.DESCRIPTION).unlink):
        damage()
        told: list[str] = []
        assert baseline.reusable(folder, workload, Key(), lambda text, fraction, told=told: told.append(text)) is None
        assert not folder.exists()
        assert "made again" in told[0]
        bundles.save(bundles.Bundle(workload, workload.build()), folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"bundle_format": 1}', '{"bundle_format": 1, "digests": [], "lineage": 3}']
)
def test_a_bundle_description_that_is_none(text: str, optimize: Optimize, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / bundles.DESCRIPTION).write_text(text)
    with pytest.raises(BadBundle):
        bundles.describe(folder)
    for command in ("show", "evaluate"):
        one_error(optimize(command, folder, "--json"), 4, "bundle")


def test_what_a_killed_command_left_is_swept(tmp_path: Path) -> None:
    left, young, users = (tmp_path / name for name in (".x.saving-abcdefgh", ".x.saving-abcdefgi", ".x.saving-of mine"))
    for folder in (left, young, users):
        (folder / "file").mkdir(parents=True)
    past = time.time() - 3600
    os.utime(left, (past, past))
    os.utime(users, (past, past))
    with scratch.folder(tmp_path, ".x.saving-") as first:
        os.utime(first, (past, past))
        with scratch.folder(tmp_path, ".x.saving-"):
            assert first.exists(), "a folder in use is locked"
    assert (left.exists(), young.exists(), users.exists(), first.exists()) == (False, True, True, False)
    for folder in (young, users):
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [("prune", "--ratio", 0.25), ("distill", "--epochs", 1, "--label-weight", 0.5), ("quantize",)]
)
@pytest.mark.usefixtures("each_step_faster")
def test_a_step_alone_on_a_workload(
    args: tuple[object, ...], user_file: UserFile, optimize: Optimize, tmp_path: Path
) -> None:
    source = user_file(UNTRAINED)
    ended = optimize(args[0], source, *args[1:], "--batch", 1, "--output", tmp_path / "made", "--json")
    assert ended.code == 0, ended.err
    made = json.loads(ended.out)
    assert made["name"].startswith(str(args[0]))
    assert set(made["cost"]) >= {"bytes", "parameters", "macs", "latency_ms", "throughput"}
    assert bundles.describe(tmp_path / "made")["lineage"][-1]["name"] == made["name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("1 / 0", "loss() raised ZeroDivisionError"),
        ("exit()", "loss() raised SystemExit"),
        ("0.5", "loss() returned float"),
        ('functional.cross_entropy(outputs["logits"], targets, reduction="none")', "loss() returned (64,)"),
    ],
)
def test_a_bad_loss(change: str, said: str, user_file: UserFile, optimize: Optimize, tmp_path: Path) -> None:
    source = user_file(UNTRAINED, ('functional.cross_entropy(outputs["logits"], targets)', change))
    arguments = ("--epochs", 1, "--label-weight", 0.5, "--output", tmp_path / "made", "--json")
    one_error(optimize("distill", source, *arguments), 4, said)
    assert not (tmp_path / "made").exists()


def test_a_steps_output_is_checked_before_the_work(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output, said in ((tmp_path / "file", "is not a bundle"), (tmp_path / "file" / "made", "cannot be used")):
        ended = optimize("distill", SOURCE, "--output", output, "--json")
        one_error(ended, 4, said)
        assert "exporting" not in ended.err
