"""Configurations that contradict themselves: found without a server, and what is said to do about it works."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from serve.cli import main
from serve.repository import contradictions, lint
from serve.server import dryload
from tests.serve.backends.test_backend import save

HEAD = 'backend: "onnxruntime" max_batch_size: 8'
X, Y = 'input { name: "x" data_type: TYPE_FP32 dims: 4 }', 'output { name: "y" data_type: TYPE_FP32 dims: 4 }'
SUM = """
output { name: "sum" data_type: TYPE_FP32 dims: 1 } output { name: "whose" data_type: TYPE_STRING dims: 1 }
sequence_batching {
  state {
    input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: 1
    initial_state { name: "zero" data_type: TYPE_FP32 dims: 1 zero_data: true }
  }
  %s
}
input { name: "x" data_type: TYPE_FP32 dims: 1 }
"""
IDS = 'control_input { name: "who" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }'


def rows(path: Path) -> Path:
    return save(path, [("Relu", ["x"], ["y"])], [("x", T.FLOAT, ["N", 4])], [("y", T.FLOAT, ["N", 4])])


def running_sum(path: Path) -> Path:
    number, text = (T.FLOAT, ["N", 1]), (T.STRING, ["N", 1])
    nodes = [("Add", ["x", "before"], ["sum"]), ("Identity", ["sum"], ["after"]), ("Identity", ["who"], ["whose"])]
    inputs = [("x", *number), ("before", *number), ("who", *text)]
    return save(path, nodes, inputs, [("sum", *number), ("after", *number), ("whose", *text)])


CASES: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "an input twice": (rows, f"{HEAD} {X} {X} {Y}", "lists the input x 2 times", f"{HEAD} {X} {Y}"),
    "an output twice": (rows, f"{HEAD} {X} {Y} {Y}", "lists the output y 2 times", f"{HEAD} {X} {Y}"),
    "ids that are text": (
        *(running_sum, HEAD + SUM % IDS, "the input who takes a sequence's id as text"),
        HEAD + SUM % "" + 'input { name: "who" data_type: TYPE_STRING dims: 1 }',
    ),
    "optional without a default": (
        *(
            rows,
            f"{HEAD} {X[:-1]} optional: true }} {Y}",
            "the input x is optional by config.pbtxt, and the",
        ),
        f"{HEAD} {X} {Y}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_and_the_way_out_works(case: str, tmp_path: Path, server_prefix: Path) -> None:
    make, wrong, says, right = CASES[case]
    (tmp_path / "m" / "1").mkdir(parents=True)
    make(tmp_path / "m" / "1" / "model.onnx")
    (tmp_path / "m" / "config.pbtxt").write_text(wrong)
    (found,) = lint.check(tmp_path)
    assert found.level == "error" and found.what.startswith(says), found
    (tmp_path / "m" / "config.pbtxt").write_text(right)
    assert [*lint.check(tmp_path), *dryload.findings(tmp_path, "m")] == []


def test_ways_that_multiply_are_gone_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def calls(_place: Path, model: str) -> list[str]:
        asked.append(model)
        layer = int(model.rpartition("-")[2])
        return [f"a-{layer + 1}", f"b-{layer + 1}"] if layer < 20 else []

    monkeypatch.setattr(contradictions.repository, "calls", calls)
    assert contradictions._circle(tmp_path, ("a-0",), set()) == ()
    assert len(asked) == 41


@pytest.mark.parametrize("calls", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_steps_that_call_each_other(calls: dict[str, str], tmp_path: Path, server_prefix: Path) -> None:
    def write(model: str, called: str) -> None:
        (tmp_path / model / "1").mkdir(parents=True, exist_ok=True)
        maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
        step = f'ensemble_scheduling {{ step {{ model_name: "{called}" model_version: -1 {maps} }} }}'
        (tmp_path / model / "config.pbtxt").write_text(f'platform: "ensemble" max_batch_size: 8 {X} {Y} {step}')

    for model, called in calls.items():
        write(model, called)
    (tmp_path / "rows" / "1").mkdir(parents=True)
    rows(tmp_path / "rows" / "1" / "model.onnx")
    (tmp_path / "rows" / "config.pbtxt").write_text(f"{HEAD} {X} {Y}")
    said = CliRunner().invoke(main, ["check", "--repository", str(tmp_path)])
    assert said.exit_code == 4, said.output
    assert said.stdout.count("error: ") == len(calls)
    assert "never ends, since its steps call each other: a, " in said.stdout
    write(max(calls), "rows")
    fine = CliRunner().invoke(main, ["check", "--repository", str(tmp_path)])
    assert (fine.exit_code, fine.stdout) == (0, "nothing is wrong\n"), fine.output
