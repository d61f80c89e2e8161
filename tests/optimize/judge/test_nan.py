"""NaN passes nothing: it is neither within a limit, nor equal, nor better."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from modelathe.tensors import Arrays
from optimize.judge import ensure, gate, mates, parity
from optimize.judge.budget import Budget
from optimize.judge.evaluate import Difference, Score
from optimize.methods.export import verify
from optimize.model.errors import BadGraph, BadRecipe
from optimize.runs import recipe

NAN = float("nan")
TRAINED = Score("accuracy", np.ones(9), 0.9, 0.8, 1.0, True, True)
SAME = Difference(0.0, -0.01, 0.01, (), (), True, lambda samples: (-0.01, 0.01))


@given(
    st.sampled_from(["trained", "result", "value", "low", "high"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([Budget(max_drop=1e9), Budget(keep=0.01), Budget()]),
    st.sampled_from([NAN, float("inf"), float("-inf")]),
)
def test_no_quality_with_nan_passes(where: str, strict: bool, up: bool, budget: Budget, bad: float) -> None:
    trained = replace(TRAINED, higher_is_better=up or budget.max_drop is None)
    result, difference = trained, replace(SAME, higher_is_better=trained.higher_is_better)
    assert gate.quality(Budget(max_drop=1e9), trained, result, difference, strict).passed
    if where == "trained":
        trained = replace(trained, value=bad)
    elif where == "result":
        result = replace(result, value=bad)
    else:
        difference = replace(difference, **{where: bad})
    assert not gate.quality(budget, trained, result, difference, strict).passed


def report(done: int = 299, p99: float | None = 1.0, **more: Any) -> dict[str, Any]:
    requests = {"planned": done, "done": done, "failed": 0, "dropped": 0, "mismatched": 0}
    times = {"latency_ms": {"p99": p99}}
    return {
        "valid": True,
        "why": "",
        "fault": "",
        "requests": requests,
        "judged_ms": times,
        "plan": {"duration": 5.0},
        **more,
    }


@pytest.mark.parametrize("p99", [None, NAN])
def test_no_latency_is_no_low_latency(p99: float | None) -> None:
    assert [entry.passed for entry in gate.load(Budget(p99_ms=20), report())] == [True, True]
    assert [entry.passed for entry in gate.load(Budget(p99_ms=20), report(p99=p99))] == [True, False]


def test_a_load_that_nobody_answered_did_not_pass() -> None:
    answered, late = gate.load(Budget(p99_ms=20), report(done=0, p99=None))
    assert not answered.passed
    assert (late.passed, late.measured) == (False, "none answered")
    assert not gate.load(Budget(), report(valid=NAN))[0].passed


@pytest.mark.parametrize(
    ("requests", "mismatched", "largest", "tolerance"),
    [(10, 0, NAN, 1e-5), (10, 0, 0.0, NAN), (0, 0, 0.0, 1e-5), (10, NAN, 0.0, 1e-5)],
)
def test_no_parity_with_nan_passes(requests: int, mismatched: Any, largest: float, tolerance: float) -> None:
    lane = {"lane": "same batches", "requests": 10, "mismatched": 0, "max_abs_diff": 0.0, "tolerance": 1e-5}
    assert gate.parity(lane).passed
    found = {"requests": requests, "mismatched": mismatched, "max_abs_diff": largest, "tolerance": tolerance}
    assert not gate.parity({**lane, **found}).passed


@pytest.mark.parametrize("spoiled", ["first", "second"])
def test_nan_answers_are_mismatches_in_both_lanes(spoiled: str) -> None:
    wanted = {name: np.ones((4, 3), np.float32) for name in ("first", "second")}
    answers = {name: array.copy() for name, array in wanted.items()}
    answers[spoiled][2, 1] = np.nan
    same = parity.lane("same batches", [(answers, wanted)], 1e-5)
    rows = [(_row(answers, index), _row(wanted, index)) for index in range(4)]
    batched = parity.lane("batched by the server", rows, {"first": 1e-5, "second": 1.0})
    for lane in (same, batched):
        assert (lane["requests"], lane["mismatched"], lane["output"]) == (4, 1, spoiled)
        assert np.isnan(lane["max_abs_diff"])
        assert not gate.parity({**lane, "mismatched": 0}).passed


def _row(arrays: Mapping[str, Any], index: int) -> Arrays:
    return {name: array[index : index + 1] for name, array in arrays.items()}


@pytest.mark.parametrize("key", ["max_drop", "p99_ms", "keep"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_budget_is_a_number(key: str, value: float) -> None:
    assert key in {entry.name for entry in fields(Budget)}
    with pytest.raises(BadRecipe, match=key):
        recipe.parse({"budget": {key: value}, "step": [{"use": "export.onnx"}]})


@pytest.mark.parametrize(
    ("got", "wanted", "fault"),
    [
        ([1.0, np.nan], [1.0, 2.0], True),
        ([1.0, np.nan], [1.0, -np.inf], True),
        ([1.0, np.inf], [1.0, 2.0], True),
        ([np.nan, np.inf], [1.0, -np.inf], True),
        ([1.0, -np.inf], [3.0, -np.inf], False),
        ([1.0, 0.0], [3.0, -np.inf], False),
    ],
)
def test_a_step_may_not_bring_nan_in(got: list[float], wanted: list[float], fault: bool) -> None:
    assert bool(ensure._fault(np.array(got), np.array(wanted))) is fault


@pytest.mark.parametrize(
    ("got", "wanted", "differs"),
    [
        ([np.inf, 1], [np.inf, 1], False),
        ([np.nan, 1], [np.nan, 1], False),
        ([-np.inf, 1], [np.inf, 1], True),
        ([np.nan, 1], [np.inf, 1], True),
        ([np.nan, 1], [1, 1], True),
    ],
)
def test_an_export_with_another_infinity_differs(got: list[float], wanted: list[float], differs: bool) -> None:
    arrays = ({"y": np.array(values, np.float32)} for values in (got, wanted))
    assert bool(verify._difference(*arrays, True)) is differs


def test_a_deviation_that_is_nan_is_no_deviation_of_zero(tmp_path: Path) -> None:
    """The graph divides by the sum over the batch, which is 0 for some companies."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=1),
        helper.make_node("Div", ["x", "sum"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "shares", ends[:1], ends[1:])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    inputs = [{"x": np.array([[1.0], [-1.0], [0.0]], np.float32)}]
    with pytest.raises(BadGraph, match="NaN"):
        mates.deviation(tmp_path / "m.onnx", inputs, 3)
