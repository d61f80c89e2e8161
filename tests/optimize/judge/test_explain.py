from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimize.judge import explain
from optimize.judge.explain import Stage
from optimize.judge.ruler import Ratio

CALM = {8: Ratio(1.0, 0.99, 1.01)}


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
    change = {1: Ratio(0.4, 0.3, 0.5), 8: Ratio(1.3, 1.2, 1.4)}
    cause = explain.slower(
        [Stage("trained", before, {1: 1.0, 8: 4.0}), Stage(step, after, {1: 2.5, 8: 3.0}, change)], 1
    )
    assert cause.startswith(f"{step} made it slower at batch 1: 0.40× [0.30, 0.50]: ")
    assert says in cause


@pytest.mark.parametrize(
    ("step", "kinds", "says"),
    [
        ("quantize.static", ("QuantizeLinear", "DequantizeLinear", "Conv"), "TensorRT as runtime"),
        ("quantize.half", ("Cast", "MatMul", "Cast"), "raise the batch"),
    ],
)
def test_the_cause_on_a_gpu_is_not_that_on_a_cpu(step: str, kinds: tuple[str, ...], says: str, tmp_path: Path) -> None:
    before, after = graph(tmp_path / "before.onnx", "MatMul"), graph(tmp_path / "after.onnx", *kinds)
    stages = [Stage("trained", before, {1: 1.0}), Stage(step, after, {1: 2.0}, {1: Ratio(0.5, 0.4, 0.6)})]
    cause = explain.slower(stages, 1, "cuda")
    assert says in cause
    assert "CPU" not in cause


def test_below_the_overhead_of_a_call_nothing_can_be_gained(tmp_path: Path) -> None:
    file = graph(tmp_path / "model.onnx", "MatMul")
    stages = [
        Stage("trained", file, {1: 0.012}),
        Stage("quantize.dynamic", file, {1: 0.03}, {1: Ratio(0.4, 0.3, 0.5)}),
    ]
    cause = explain.slower(stages, 1)
    assert "the trained model's call takes 12 µs" in cause


def staged(file: Path, **changes: Ratio) -> list[Stage]:
    steps = [Stage(name.replace("_", "."), file, {8: 1.0}, {8: change}) for name, change in changes.items()]
    return [Stage("trained", file, {8: 2.0}), *steps]


def test_the_step_that_cost_most_is_named_not_the_last(tmp_path: Path) -> None:
    found = staged(
        graph(tmp_path / "model.onnx", "MatMul"),
        prune_channels=Ratio(2.0, 1.9, 2.1),
        quantize_dynamic=Ratio(0.33, 0.30, 0.36),
        quantize_half=Ratio(0.9, 0.88, 0.92),
    )
    assert explain.slower(found, 8).startswith("quantize.dynamic made it slower at batch 8: 0.33× [0.30, 0.36]: ")
    assert [warning.partition(",")[0] for warning in explain.warnings(found, CALM)] == [
        "quantize.dynamic made it slower at batch 8: 0.33× [0.30",
        "quantize.half made it slower at batch 8: 0.90× [0.88",
    ]


def test_a_step_within_the_noise_is_never_blamed(tmp_path: Path) -> None:
    found = staged(
        graph(tmp_path / "model.onnx", "MatMul"),
        export_onnx=Ratio(0.6, 0.3, 1.1),
        quantize_dynamic=Ratio(0.95, 0.93, 0.96),
    )
    assert explain.slower(found, 8).startswith("quantize.dynamic made it slower")
    assert len(explain.warnings(found, CALM)) == 1
    noise = found[:2]
    assert "export.onnx" not in explain.slower(noise, 8)
    assert "no single step is shown to have slowed it down" in explain.slower(noise, 8)
    assert explain.warnings(noise, CALM) == []


@pytest.mark.parametrize("control", [Ratio(0.8, 0.79, 0.81), Ratio(1.0, 0.3, 2.0), Ratio(*[float("nan")] * 3)])
def test_no_step_is_blamed_where_the_trained_model_is_not_as_fast_as_itself(control: Ratio, tmp_path: Path) -> None:
    found = staged(graph(tmp_path / "model.onnx", "MatMul"), quantize_half=Ratio(0.8, 0.79, 0.81))
    assert len(explain.warnings(found, CALM)) == 1
    assert explain.warnings(found, {8: control}) == []


def test_the_cause_of_a_larger_file(tmp_path: Path) -> None:
    small, more = graph(tmp_path / "small.onnx", "MatMul"), graph(tmp_path / "more.onnx", *["MatMul"] * 9)
    tiny = explain.larger([Stage("trained", small, {}), Stage("quantize.static", more, {})])
    assert tiny.startswith(f"quantize.static made it larger ({small.stat().st_size:,} → {more.stat().st_size:,} bytes)")
    assert "mostly the description of its graph" in tiny
    large = graph(tmp_path / "large.onnx", "MatMul", weight=explain.TINY_FILE)
    larger = graph(tmp_path / "larger.onnx", "MatMul", weight=2 * explain.TINY_FILE)
    assert "added more" in explain.larger([Stage("trained", large, {}), Stage("quantize.static", larger, {})])
