"""What a run says of the speed of its steps: each against the trained model, and against the step before."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelathe.errors import ModelatheError
from optimize.judge import explain, ruler, speed
from optimize.judge.ruler import CONTROL, Speeds, Until
from optimize.judge.speed import Timing
from optimize.model.errors import BusyMachine, GateRefused
from optimize.report import table
from optimize.runs import pipeline, recipe
from optimize.runs.run import Terms
from optimize.source.workload import Workload
from serve.config.target import Target

TIMES = {"trained": 10.0, "1-prune": 5.0, "2-export": 5.0, "3-quantize": 5.7}
"""A recipe whose last step costs speed, though the result is faster than the trained model."""


def timing(folder: Path) -> Timing:
    wobble = [0.99, 1.01, 1.0, 0.995, 1.005, 0.99, 1.01, 0.999, 1.001]
    places = enumerate(TIMES.items())
    seconds = {name: {1: [time * luck for luck in wobble[at:] + wobble[:at]]} for at, (name, time) in places}
    files = {}
    for name in TIMES:
        files[name] = folder / f"{name}.onnx"
        files[name].write_bytes(b"x" * 100)
    seconds[CONTROL] = {1: [10.0 * luck for luck in reversed(wobble)]}
    return Timing(files, [name.rpartition("-")[2] for name in TIMES], Speeds(seconds, "trained", took=9.0))


def test_a_step_is_against_the_trained_model_and_the_step_before(tmp_path: Path) -> None:
    made = timing(tmp_path)
    last = made.ratios("3-quantize")
    assert last == made.ratios(made.result)
    assert last["throughput"]["1"] == pytest.approx(1.754, rel=0.01)
    assert last["before"]["1"]["value"] == pytest.approx(0.877, rel=0.01)
    assert (last["verdict"]["1"], last["before"]["1"]["verdict"]) == ("not slower", "slower")
    assert last["control"]["1"]["low"] <= 1 <= last["control"]["1"]["high"]
    assert last["rounds"] == 9
    assert made.ratios("2-export")["before"]["1"]["verdict"] == "not slower"
    assert made.ratios("trained")["before"] == {}


def test_the_step_that_costs_speed_is_warned_of_though_the_result_is_faster(tmp_path: Path) -> None:
    made = timing(tmp_path)
    [warning] = explain.warnings(made.stages(), made.speeds.control())
    assert warning.startswith("quantize made it slower at batch 1: 0.88× [0.8")


def alternating(times: Mapping[str, Sequence[float]]) -> Callable[..., Speeds]:
    """Return what stands in for the ruler, with these times of each step in nine rounds."""

    def rounds(visit: object, names: Sequence[str], *, baseline: str, until: Until) -> Speeds:
        assert until.decide == [names[-1]]
        assert until.patience == 7.0
        seconds = {name: {1: list(times[name.rpartition("-")[2]])} for name in names}
        return Speeds({**seconds, CONTROL: {1: list(times[CONTROL])}}, baseline, took=9.0)

    return rounds


STEADY, WILD = [1.0] * 9, [0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.5, 2.0, 3.0]


@pytest.mark.slow
def test_only_a_speed_that_is_shown_passes(small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[budget]\nmax_drop = 1\n[target]\nbatch = [1]\n[[step]]\nuse = "quantize.dynamic"\n'
    (tmp_path / "recipe.toml").write_text(text)
    plan = recipe.load(tmp_path / "recipe.toml")

    def run(quantized: list[float], control: list[float]) -> dict[str, Any]:
        times = {"trained": STEADY, "export.onnx": STEADY, "quantize.dynamic": quantized, CONTROL: control}
        monkeypatch.setattr(ruler, "alternate", alternating(times))
        return pipeline.run(plan, small, output=tmp_path / "run", terms=Terms(patience=7.0))

    assert all(gate["passed"] for gate in run([0.5] * 9, STEADY)["gates"])
    refusals: list[tuple[list[float], list[float], type[ModelatheError], str]] = [
        ([1.2] * 9, STEADY, GateRefused, "quantize.dynamic made it slower at batch 1: 0.83"),
        ([0.9 * luck for luck in WILD], STEADY, GateRefused, "undecided: "),
        ([0.5] * 9, [0.8] * 9, BusyMachine, "counts as slower or faster than itself"),
        ([0.5] * 9, WILD, BusyMachine, "the machine is too busy: A/A spread 0.4"),
        ([0.5] * 8 + [math.nan], STEADY, GateRefused, "undecided: "),
    ]
    for quantized, control, raised, said in refusals:
        with pytest.raises(raised) as error:
            run(quantized, control)
        assert said in error.value.what
        assert error.value.partial["ratios"]["rounds"] == 9
        assert error.value.partial["resumed"], "no step is made again for another measurement"
        assert re.search("REFUSED|UNDECIDED", (tmp_path / "run" / "report.html").read_text())
        table.run(error.value.partial)


@pytest.mark.slow
@pytest.mark.timed
def test_the_same_graph_is_as_fast_as_itself(small: Workload, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[budget]\nmax_drop = 0\n[target]\nbatch = [1, 8, 32]\n[[step]]\nuse = "export.onnx"\n'
    )
    result = pipeline.run(recipe.load(tmp_path / "recipe.toml"), small, output=tmp_path / "run")
    for value in result["ratios"]["throughput"].values():
        assert value == pytest.approx(1, abs=0.07)
    assert result["warnings"] == []


def test_files_are_timed_until_the_result_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def noting(visit: object, names: Sequence[str], **how: object) -> Speeds:
        asked.update(how, names=names)
        return Speeds({name: {1: STEADY} for name in (*names, CONTROL)}, "trained")

    monkeypatch.setattr(ruler, "alternate", noting)
    speed.time(timing(tmp_path).files, list(TIMES), (), Target(batch=(1,)), patience=3.0)
    names = list(TIMES)
    until = asked["until"]
    assert asked["names"] == names and until.decide == names[-1:] and until.patience == 3.0
    assert until.pairs == [*zip(names[1:], names, strict=False), (names[-1], "trained")]
