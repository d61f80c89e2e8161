from dataclasses import replace

import numpy as np
import pytest

from optimize import gate
from optimize.errors import BadRecipe, GateRefused
from optimize.evaluate import Difference, Score
from optimize.recipe import Budget
from optimize.workload import Workload


def score(value: float, samples: int = 1000) -> Score:
    return Score("accuracy", np.zeros(samples), value, value - 0.01, value + 0.01)


def judge(budget: Budget, trained: float, result: float, low: float, high: float, strict: bool = False) -> gate.Gate:
    difference = Difference(result - trained, low, high, ())
    return gate.quality(budget, score(trained), score(result), difference, strict)


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


def test_a_wide_interval_is_called_out_with_the_samples_that_decide() -> None:
    assert "about 4,000 samples" in judge(Budget(max_drop=0.005), 0.90, 0.90, -0.005, 0.005).advice
    assert judge(Budget(max_drop=0.005), 0.90, 0.90, -0.001, 0.001).advice == ""


def test_slower_means_the_whole_interval() -> None:
    assert gate.faster(1, 0.95, 0.90, 0.98).passed
    refused = gate.faster(1, 0.90, 0.85, 0.96)
    assert not refused.passed
    assert "FP32" in refused.advice


def test_size_and_parity_and_load() -> None:
    assert gate.size(Budget(), 10) == []
    assert not gate.size(Budget(bytes=9), 10)[0].passed
    assert not gate.smaller(0.9).passed
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


def test_a_relative_budget_needs_a_bounded_metric(small: Workload) -> None:
    unbounded = replace(small, bounded=False)
    gate.check_budget(Budget(max_drop=0.1), unbounded)
    gate.check_budget(Budget(), small)
    for budget in (Budget(), Budget(keep=0.99)):
        with pytest.raises(BadRecipe, match="metric in"):
            gate.check_budget(budget, unbounded)


def test_stop_names_every_refusal() -> None:
    no = gate.Gate("quality", False, "0.1", "0.9", "train more")
    with pytest.raises(GateRefused) as error:
        gate.stop([no, gate.smaller(2.0), gate.smaller(0.5)], "build/runs/x")
    assert error.value.exit_code == 3
    assert "train more" in error.value.what
    assert "smaller" in error.value.what
    gate.stop([gate.smaller(2.0)], "")
