from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize import explain
from optimize.explain import Stage


def graph(path: Path, *kinds: str, weight: int = 4) -> Path:
    """Write a chain of operators, with one weight of so many floats; explaining reads it and never runs it."""
    names = [f"v{number}" for number in range(len(kinds) + 1)]
    nodes = [
        helper.make_node(kind, [before, "weight"], [after])
        for kind, before, after in zip(kinds, names, names[1:], strict=False)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in (names[0], names[-1])]
    weights = numpy_helper.from_array(np.zeros(weight, np.float32), "weight")
    made = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [weights])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize(
    ("step", "kinds", "says"),
    [
        ("quantize.dynamic", ("DynamicQuantizeLinear", "MatMulInteger", "Cast"), "2 conversions for 1 products"),
        ("quantize.static", ("QuantizeLinear", "DequantizeLinear", "Conv"), "INT8 convolutions of few channels"),
        ("quantize.static", ("QuantizeLinear", "DequantizeLinear", "MatMul"), "exclude the smallest layers"),
        ("quantize.weight_only", ("MatMulNBits",), "unpacked at every call"),
        ("quantize.half", ("Cast", "MatMul", "Cast"), "converts at every operator"),
        ("prune.channels", ("MatMul",), "remove more"),
    ],
)
def test_the_cause_of_a_slower_result(step: str, kinds: tuple[str, ...], says: str, tmp_path: Path) -> None:
    before = graph(tmp_path / "before.onnx", "MatMul")
    after = graph(tmp_path / "after.onnx", *kinds)
    cause = explain.slower([Stage("trained", before, {1: 1.0, 8: 4.0}), Stage(step, after, {1: 2.5, 8: 3.0})], 1)
    assert cause.startswith(f"{step} made it slower (1 → 2.5 ms a call at batch 1): ")
    assert says in cause


def test_below_the_overhead_of_a_call_nothing_can_be_gained(tmp_path: Path) -> None:
    file = graph(tmp_path / "model.onnx", "MatMul")
    cause = explain.slower([Stage("trained", file, {1: 0.012}), Stage("quantize.dynamic", file, {1: 0.03})], 1)
    assert "the trained model's call takes 12 µs" in cause


def test_the_step_that_cost_most_is_named_not_the_last(tmp_path: Path) -> None:
    file = graph(tmp_path / "model.onnx", "MatMul")
    times = {"trained": 2.0, "prune.channels": 1.0, "quantize.dynamic": 3.0, "quantize.half": 2.5}
    stages = [Stage(name, file, {8: time}) for name, time in times.items()]
    assert explain.slower(stages, 8).startswith("quantize.dynamic made it slower (1 → 3 ms a call at batch 8)")


def test_the_cause_of_a_larger_file(tmp_path: Path) -> None:
    small, more = graph(tmp_path / "small.onnx", "MatMul"), graph(tmp_path / "more.onnx", *["MatMul"] * 9)
    tiny = explain.larger([Stage("trained", small, {}), Stage("quantize.static", more, {})])
    assert tiny.startswith(f"quantize.static made it larger ({small.stat().st_size:,} → {more.stat().st_size:,} bytes)")
    assert "mostly the description of its graph" in tiny
    large = graph(tmp_path / "large.onnx", "MatMul", weight=explain.TINY_FILE)
    larger = graph(tmp_path / "larger.onnx", "MatMul", weight=2 * explain.TINY_FILE)
    assert "added more" in explain.larger([Stage("trained", large, {}), Stage("quantize.static", larger, {})])
