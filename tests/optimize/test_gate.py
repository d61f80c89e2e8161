from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from optimize import explain, gate
from optimize.errors import BadRecipe, GateRefused
from optimize.evaluate import Difference, Score
from optimize.explain import Stage
from optimize.measure import Ratio
from optimize.recipe import Budget
from optimize.workload import Workload


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
    assert "--strict" in refused.advice


def test_an_interval_that_holds_the_limit_is_called_out_with_the_samples_that_decide() -> None:
    assert "about 4,000 samples" in judge(Budget(max_drop=0.005), 0.90, 0.90, -0.01, 0.01).advice
    assert "about 4,001 samples" in judge(Budget(max_drop=0.005), 0.90, 0.89, -0.02, 0.00).advice
    assert judge(Budget(max_drop=0.005), 0.90, 0.90, -0.001, 0.001).advice == ""
    assert "even 100,000,000 samples would not decide" in judge(Budget(max_drop=0), 0.90, 0.90, -0.01, 0.01).advice


def test_slower_means_the_whole_interval(tiny: Path) -> None:
    stages = [Stage("trained", tiny, {1: 0.02}), Stage("quantize.dynamic", tiny, {1: 0.03})]
    assert gate.faster(1, Ratio(0.95, 0.90, 0.98), stages).passed
    refused = gate.faster(1, Ratio(0.90, 0.85, 0.96), stages)
    assert not refused.passed
    assert refused.measured == "0.90× [0.85, 0.96]"
    assert refused.advice == explain.slower(stages, 1)


def test_size_and_parity_and_load() -> None:
    assert gate.size(Budget(), 10) == []
    assert not gate.size(Budget(bytes=9), 10)[0].passed
    assert gate.parity("same", 10, 0, 0.0, 1e-5).passed
    assert not gate.parity("same", 10, 1, 0.1, 1e-5).passed
    report = {
        "valid": True,
        "why": [],
        "requests": {"done": 10, "failed": 0, "dropped": 0, "mismatched": 0},
        "latency_ms": {"p99": 30.0},
    }
    assert [entry.passed for entry in gate.load(Budget(p99_ms=20), report)] == [True, False]
    report["valid"] = False
    assert not gate.load(Budget(), report)[0].passed


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
