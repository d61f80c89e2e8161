import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest

from loadtest.judge import summary
from optimize.judge import explain, gate
from optimize.judge.budget import Budget
from optimize.judge.evaluate import Difference, Score
from optimize.judge.explain import Stage
from optimize.judge.ruler import CONTROL, Ratio, Speeds
from optimize.model.errors import BadRecipe, BusyMachine, GateRefused
from optimize.runs import endpoint
from optimize.runs.recipe import Recipe
from optimize.source.workload import Workload
from tests.loadtest.judge.test_validity import made


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    weight = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(np.zeros((2, 2), np.float32)))
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 20})
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), tmp_path / "tiny.onnx")
    return tmp_path / "tiny.onnx"


def score(value: float, samples: int = 1000) -> Score:
    return Score("accuracy", np.zeros(samples), value, value - 0.01, value + 0.01, True, True)


def judge(budget: Budget, trained: float, result: float, low: float, high: float, strict: bool = False) -> gate.Gate:
    value = result - trained

    def at(samples: float) -> tuple[float, float]:
        return value + (low - value) * (1000 / samples) ** 0.5, value + (high - value) * (1000 / samples) ** 0.5

    return gate.quality(budget, score(trained), score(result), Difference(value, low, high, (), (), True, at), strict)


@pytest.mark.parametrize(
    ("budget", "trained", "result", "passed"),
    [
        (Budget(keep=0.99), 0.90, 0.891, True),
        (Budget(keep=0.99), 0.90, 0.890, False),
        (Budget(), 0.90, 0.891, True),
        (Budget(), 0.90, 0.890, False),
        (Budget(max_drop=0.005), 0.90, 0.895, True),
        (Budget(max_drop=0.005), 0.90, 0.894, False),
        (Budget(max_drop=0), 0.90, 0.90, True),
        (Budget(max_drop=0.005), 0.90, 0.95, True),
    ],
)
def test_quality_on_the_value(budget: Budget, trained: float, result: float, passed: bool) -> None:
    assert judge(budget, trained, result, result - trained - 0.001, result - trained + 0.001).passed is passed


def test_strict_judges_the_worse_end() -> None:
    budget = Budget(max_drop=0.005)
    assert judge(budget, 0.90, 0.898, -0.006, 0.002).passed
    refused = judge(budget, 0.90, 0.898, -0.006, 0.002, strict=True)
    assert not refused.passed
    assert "without --strict the value is judged, which passes" in refused.advice
    assert "--strict" not in judge(budget, 0.90, 0.89, -0.016, -0.004, strict=True).advice


def test_an_interval_that_holds_the_limit_is_called_out_with_the_samples_that_decide() -> None:
    assert "about 4,000 samples" in judge(Budget(max_drop=0.005), 0.90, 0.90, -0.01, 0.01).advice
    assert "about 4,001 samples" in judge(Budget(max_drop=0.005), 0.90, 0.89, -0.02, 0.00).advice
    assert judge(Budget(max_drop=0.005), 0.90, 0.90, -0.001, 0.001).advice == ""
    assert "even 100,000,000 samples would not decide" in judge(Budget(max_drop=0), 0.90, 0.90, -0.01, 0.01).advice
    # Where the whole interval lies beyond the limit, no more samples are needed.
    assert "decide" not in judge(Budget(max_drop=0.005), 0.90, 0.25, -0.69, -0.61).advice


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        (("prune.heads", "export.onnx"), "prune less; a larger max_drop accepts the loss"),
        (("distill.logits",), "distill longer; a larger max_drop accepts the loss"),
        (("export.onnx",), "a larger max_drop accepts the loss"),
        (("export.onnx", "quantize.static"), gate.LOSE_LESS["quantize."] + "; a larger max_drop accepts the loss"),
        (("prune.heads", "distill.logits"), "prune less, distill longer; a larger max_drop accepts the loss"),
    ],
)
def test_the_advice_is_about_the_recipes_own_steps(steps: tuple[str, ...], advice: str) -> None:
    lost = Difference(-0.1, -0.2, -0.05, (), (), True, lambda samples: (-0.2, -0.05))
    refused = gate.quality(Budget(max_drop=0.005), score(0.9), score(0.8), lost, steps=steps)
    assert not refused.passed
    assert refused.advice == advice


def timed(result: float, noise: float = 0.0, doubt: float = 1.0) -> Speeds:
    """Return nine rounds of a result so many times as fast as the trained model, which is `doubt` times itself."""
    luck = [math.exp(noise * deviation) for deviation in (-1.4, -1, -0.6, -0.3, 0, 0.3, 0.6, 1, 1.4)]
    rounds = {"trained": [1.0] * 9, "result": [value / result for value in luck]}
    rounds[CONTROL] = [value / doubt for value in luck]
    return Speeds({name: {1: seconds} for name, seconds in rounds.items()}, "trained", took=18.0)


def faster(speeds: Speeds, tiny: Path) -> gate.Gate:
    change = {1: Ratio(0.7, 0.6, 0.8)}
    stages = [Stage("trained", tiny, {1: 0.02}), Stage("quantize.dynamic", tiny, {1: 0.03}, change)]
    return gate.faster(1, "result", speeds, stages)


def test_a_promise_of_speed_is_kept_where_the_whole_interval_lies_above(tiny: Path) -> None:
    assert faster(timed(1.0), tiny).passed
    slower = faster(timed(0.9, 0.01), tiny)
    assert not slower.passed and not slower.machine
    assert slower.measured.startswith("0.90× [0.89, 0.91]")
    assert slower.advice.startswith("quantize.dynamic made it slower at batch 1: 0.70× [0.60, 0.80]: ")


def test_what_is_not_faster_is_not_called_so(tiny: Path) -> None:
    """A kept promise of speed is one of not being slower by more than 3 %."""
    a_little = faster(timed(0.98, 0.001), tiny)
    assert a_little.passed
    assert a_little.measured.startswith("0.98× [0.98, 0.98] (no faster, and no more than 3 % slower), ")
    assert "no faster" not in faster(timed(1.0), tiny).measured + faster(timed(0.9), tiny).measured


def test_undecided_is_no_pass_and_says_how_long_it_would_take(tiny: Path) -> None:
    undecided = faster(timed(1.1, 0.3), tiny)
    assert not undecided.passed and not undecided.machine
    assert "undecided: the machine is too busy: A/A spread 0.69 to 1.5 in 9 rounds" in undecided.advice
    assert "a quiet machine takes about 18 s, here about " in undecided.advice
    near = faster(timed(0.97, 0.001), tiny)
    assert not near.passed
    assert "its speed is too near 0.97× to tell" in near.advice
    with pytest.raises(GateRefused):
        gate.stop([undecided], "")


@pytest.mark.parametrize(("noise", "doubt"), [(0.01, 1.2), (0.01, 0.8), (0.8, 1.0), (math.nan, 1.0)])
def test_where_the_trained_model_is_not_itself_the_machine_is_at_fault(noise: float, doubt: float, tiny: Path) -> None:
    found = faster(timed(2.0, noise, doubt), tiny)
    assert not found.passed and found.machine
    assert "the machine is too busy" in found.advice
    assert "the same file counts as slower or faster than itself; a quiet machine takes about 18 s; run" in found.advice
    with pytest.raises(BusyMachine) as raised:
        gate.stop([found], "run")
    assert raised.value.exit_code == 5
    with pytest.raises(GateRefused):
        gate.stop([found, gate.Gate("quality", False, "0.1", "0.9", "train more")], "run")


def test_a_speed_of_nan_is_no_pass(tiny: Path) -> None:
    assert not faster(timed(math.nan), tiny).passed


def test_size_and_parity() -> None:
    assert gate.size(Budget(), 10) == []
    assert not gate.size(Budget(bytes=9), 10)[0].passed
    lane = {"lane": "same", "requests": 10, "mismatched": 0, "max_abs_diff": 0.0, "tolerance": 1e-5}
    assert gate.parity(lane).passed
    assert not gate.parity({**lane, "mismatched": 1, "max_abs_diff": 0.1}).passed


TWENTY = Budget(p99_ms=20)


def loaded(*latencies: float, bad: int = 0, budget: Budget = TWENTY, **more: Any) -> list[gate.Gate]:
    """Judge a run of so many requests, of which the last `bad` failed."""
    verdicts = [*["ok"] * (len(latencies) - bad), *["error"] * bad]
    run = made(
        np.arange(len(latencies)) / 100, np.array(latencies), verdicts, thresholds=gate.sentences(budget), **more
    )
    return gate.load(budget, summary.summary(run))


def test_the_load_tests_p99_is_a_threshold_like_any_other() -> None:
    assert [entry.passed for entry in loaded(*[0.01] * 299)] == [True, True]
    assert [entry.passed for entry in loaded(*[0.03] * 299)] == [True, False]
    assert [entry.passed for entry in loaded(*[0.03] * 299, budget=Budget())] == [True]
    _, few = loaded(*[0.01] * 75)
    assert not few.passed
    assert few.advice == (
        "undecided: 75 requests are too few, 299 are needed; run for 120 s at this rate (duration in [load])"
    )
    # Of a failed request nothing is known but that it is slower than any.
    answered, late = loaded(*[0.01] * 900, *[0.001] * 9, bad=9)
    assert (answered.passed, late.passed) == (False, True)
    answered, late = loaded(*[0.01] * 900, *[0.001] * 10, bad=10)
    assert (answered.passed, late.passed, late.measured) == (False, False, "inf ms")


def test_the_plan_says_what_the_load_test_is_judged_by() -> None:
    asked = Recipe((), budget=Budget(p99_ms=12.5))
    server: Any = SimpleNamespace(http="http://127.0.0.1:8000")
    plan = endpoint._plan(server, asked)
    assert plan.thresholds == ("p99 <= 12.5ms",)
    assert endpoint._plan(server, replace(asked, budget=Budget())).thresholds == ()


@pytest.mark.parametrize("plan", [{"concurrency": 2}, {"rate": 100.0}])
def test_a_client_that_was_late_is_the_machines_fault_and_says_what_to_do(plan: dict[str, Any]) -> None:
    late = {"loop_lag_ms": {"p99": 90.0, "p999": 95.0, "max": 99.0}}
    found = loaded(*[0.01] * 3000, end=late, **plan)
    assert [(entry.passed, entry.machine) for entry in found] == [(False, True), (False, True)]
    assert found[0].advice.startswith("the machine is too busy: the client was late itself: its lag p99 is 90.00 ms")
    assert f"it takes 30 quiet s{', or a lower rate in [load]' * ('rate' in plan)}; {gate.QUIETER}" in found[0].advice
    with pytest.raises(BusyMachine):
        gate.stop(found, "run")
    # Whatever the client did, an answer that failed is the model's or the server's.
    found = loaded(*[0.01] * 3000, bad=1, end=late, **plan)
    assert not any(entry.passed or entry.machine for entry in found)
    with pytest.raises(GateRefused):
        gate.stop(found, "run")


def test_requests_that_left_late_are_the_machines_fault_unless_the_server_held_them_up() -> None:
    assert {entry.machine for entry in loaded(*[0.01] * 299, lag=0.1)} == {True}
    full = {"backlog": {"most": 1024, "full": 20.0}}
    found = loaded(*[0.01] * 299, lag=0.1, end=full)
    assert {(entry.passed, entry.machine) for entry in found} == {(False, False)}
    assert "the server was slower than the load" in found[0].advice


def test_smaller_means_smaller(tiny: Path) -> None:
    stages = [Stage("trained", tiny, {}), Stage("export.onnx", tiny, {})]
    assert gate.smaller(1.01, stages).passed
    refused = gate.smaller(0.9, stages)
    assert not refused.passed
    assert refused.advice == explain.larger(stages)


def test_a_relative_budget_needs_a_bounded_metric(small: Workload) -> None:
    unbounded = replace(small, bounded=False)
    gate.check_budget(Budget(max_drop=0.1), unbounded)
    gate.check_budget(Budget(), small)
    for budget in (Budget(), Budget(keep=0.99)):
        with pytest.raises(BadRecipe, match="metric in"):
            gate.check_budget(budget, unbounded)


def test_stop_names_every_refusal() -> None:
    no = gate.Gate("quality", False, "0.1", "0.9", "train more")
    passed = replace(no, passed=True)
    with pytest.raises(GateRefused) as error:
        gate.stop([no, passed, replace(no, name="promise: smaller")], "build/runs/x")
    assert error.value.exit_code == 3
    assert "train more" in error.value.what
    assert "smaller" in error.value.what
    gate.stop([passed], "")
