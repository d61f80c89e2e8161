"""The zoo: which examples run, how a row is judged, and that one which breaks leaves the others alone."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from modelathe import interpreter
from optimize.runs import recipe
from optimize.source.load import load_workload
from optimize.step.contract import fingerprint

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
SMALL = Path(__file__).parents[1] / "small.py"
UNDER_TWO_MINUTES = ("mlp_binary", "gru")

BROKEN = "def workload():\n    raise RuntimeError('no such data')\n"
RECIPE = """
[target]
batch = [1, 32]
[[step]]
use = "quantize.dynamic"
[load]
duration = 0.3
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", ROOT / "benchmarks" / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module
    spec.loader.exec_module(module)
    return module


zoo = load()


def run(*args: object) -> Result:
    return CliRunner().invoke(zoo.main, [str(arg) for arg in args])


def gate(passed: bool, advice: str) -> dict[str, Any]:
    return {"name": "promise: smaller", "passed": passed, "measured": "0.9×", "limit": "> 1×", "advice": advice}


def test_every_architecture_has_an_example_and_a_valid_recipe() -> None:
    assert len(set(zoo.NAMES)) == 14
    for name in zoo.NAMES:
        assert (EXAMPLES / f"{name}.py").is_file()
        assert {1, 32} <= set(recipe.load(EXAMPLES / f"{name}.toml").target.batch)


def test_an_unknown_name_ends_with_2_and_the_list_before_anything_runs(tmp_path: Path) -> None:
    ended = run("mlp", "mpl", "--output", tmp_path / "out")
    assert ended.exit_code == 2
    assert "there is no mpl" in ended.output and "sentence_embedding" in ended.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "gates", "verdict"),
    [
        (0, [gate(True, "")], "passed"),
        (3, [gate(True, ""), gate(False, "prune more")], "refused"),
        (3, [gate(False, "")], "failed"),
        (3, None, "failed"),
        (1, [gate(False, "prune more")], "failed"),
        (4, None, "failed"),
        (0, None, "failed"),
    ],
)
def test_only_a_refusal_that_says_what_to_do_is_no_failure(
    code: int, gates: list[dict[str, Any]] | None, verdict: str
) -> None:
    made = zoo.judged("mlp", code, None if gates is None else {"gates": gates}, "the last line")
    assert made.verdict == verdict
    assert ("prune more" if verdict == "refused" else "") in made.why
    assert verdict != "failed" or "the last line" in made.why


@pytest.mark.slow
def test_weights_are_trained_once_and_again_when_their_file_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(importlib.import_module("trained"), "CACHE", tmp_path / "cache")
    example = tmp_path / "mlp.py"
    source = (EXAMPLES / "mlp.py").read_text().replace("epochs=60", "epochs=1")

    def weights() -> tuple[str, bool]:
        made = load_workload(f"{example}:workload")
        # Random augmentation that was read before must not show in the weights.
        next(made.batches("training"))
        return fingerprint(made.build()), "training the weights of mlp, once" in capsys.readouterr().err

    example.write_text(source)
    first = weights()
    assert first[1]
    assert weights() == (first[0], False)
    example.write_text(source.replace("epochs=1", "epochs=2"))
    changed = weights()
    assert changed[1] and changed[0] != first[0]
    # A file that was cut short is not used.
    (tmp_path / "cache" / "mlp.safetensors").write_bytes(b"cut")
    assert weights() == changed


@pytest.mark.slow
def test_goes_on_after_a_failure_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = interpreter.command
    monkeypatch.setattr(interpreter, "command", lambda _optimize, *words: command("tests.optimize.hurried", *words))
    (tmp_path / "mlp.py").write_text(BROKEN)
    (tmp_path / "lstm.py").write_text(SMALL.read_text())
    for name in ("mlp", "lstm"):
        (tmp_path / f"{name}.toml").write_text(RECIPE)
    ended = run("mlp", "lstm", "mlp", "--examples", tmp_path, "--output", tmp_path / "out")
    assert ended.exit_code == 1
    assert "mlp failed: exit code 4" in ended.output and "no such data" in ended.output
    [document] = json.loads((tmp_path / "out" / "zoo.json").read_text())
    assert document["workload"] == "small"


@pytest.mark.exhaustive
@pytest.mark.timed
def test_two_architectures_reach_the_endpoint_or_are_refused_with_a_reason(tmp_path: Path) -> None:
    ended = run(*UNDER_TWO_MINUTES, "--output", tmp_path)
    assert ended.exit_code == 0, ended.output
    binary, *others = json.loads((tmp_path / "zoo.json").read_text())
    assert [document["workload"] for document in (binary, *others)] == list(UNDER_TWO_MINUTES)
    # 41 parameters: INT8 adds more to the file than it saves.
    assert binary["version"] is None and binary["ratios"]["size"] < 1
    assert "mlp_binary refused: promise: smaller" in ended.output
    for document in others:
        quality = document["result"]["quality"]
        assert quality["low"] <= quality["value"] <= quality["high"]
        assert quality["value"] >= 0.99 * document["trained"]["quality"]["value"]
        assert document["ratios"]["size"] >= 2
        assert set(document["ratios"]["throughput"]) == {"1", "32"}
        assert document["endpoint"]["parity"]["mismatched"] == 0
        assert document["version"] is not None
