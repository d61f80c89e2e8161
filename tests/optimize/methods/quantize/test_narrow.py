"""Formats of 16, 8 and 4 bits: quantize.half, quantize.fp8 and quantize.weight_only."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto
from torch import nn

from modelathe.tensors import BATCH, Array, TensorSpec
from optimize.graph import graph
from optimize.judge.evaluate import relative_error
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.fp8 import Fp8
from optimize.methods.quantize.half import Half
from optimize.methods.quantize.mixed import Mixed
from optimize.methods.quantize.weight_only import WeightOnly
from optimize.model.errors import BadRecipe, NoEffect
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.ranges import largest
from optimize.predict.runtimes import open_graph
from optimize.runs.recipe import Recipe
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target
from serve.repository import onnx_file

Apply = Callable[[Any], Path]


@pytest.fixture(scope="module")
def exported(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small.build(), small.inputs, small.outputs, tmp_path_factory.mktemp("exported") / "model.onnx")


def context(workload: Workload, scratch: Path, target: Target | None = None) -> Context:
    return Context(workload, workload.build(), target or Target(cores=2), 0, scratch, lambda text, fraction: None)


@pytest.fixture
def apply(small: Workload, exported: Path, tmp_path: Path) -> Apply:
    return lambda config: step.apply(config, exported, context(small, tmp_path))


def answers(path: Path, small: Workload) -> Array:
    with OnnxPredictor(path) as predictor:
        return np.concatenate([predictor.predict(batch.inputs)["logits"] for batch in small.batches("evaluation")])


def distance(path: Path, exported: Path, small: Workload) -> float:
    """Largest difference to the float graph's answers, as a share of the largest of those."""
    wanted = answers(exported, small)
    return float(np.abs(answers(path, small) - wanted).max() / np.abs(wanted).max())


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in graph.load(path).graph]


@pytest.mark.parametrize(
    ("config", "shrinks", "close"),
    [
        (Half(), 1.9, 1e-3),
        (Half(dtype="bfloat16"), 1.9, 5e-3),
        (Half(compute=True), 1.9, 2e-3),
        (Fp8(), 3.5, 0.08),
        (WeightOnly(), 3.3, 0.01),
        (WeightOnly(weights="int4"), 5.5, 0.08),
        (WeightOnly(weights="int4", symmetric=False, block_size="128"), 5.5, 0.08),
    ],
    ids=str,
)
def test_smaller_and_close(
    config: Any, shrinks: float, close: float, apply: Apply, exported: Path, small: Workload
) -> None:
    made = apply(config)
    assert exported.stat().st_size / made.stat().st_size > shrinks
    assert 0 < distance(made, exported, small) < close


def test_finer_blocks_are_nearer_and_larger(small: Workload, exported: Path, tmp_path: Path) -> None:
    found = []
    for size in ("16", "256"):
        (scratch := tmp_path / size).mkdir()
        made = step.apply(WeightOnly(weights="int4", block_size=size), exported, context(small, scratch))  # type: ignore[arg-type]
        off = float(np.abs(answers(made, small) - answers(exported, small)).mean())
        found.append((off, made.stat().st_size))
    (near, large), (far, little) = found
    assert near < far
    assert large > little


@pytest.mark.parametrize("config", [Half(), Half(compute=True), Fp8(), WeightOnly()], ids=str)
def test_an_excluded_layer_stays_as_it_is(config: Any, apply: Apply, exported: Path) -> None:
    weights = {array.shape: array for array in _floats(apply(replace(config, exclude=("wide*",))))}
    wide = next(array for array in _floats(exported) if array.shape == (768, 768))
    assert np.array_equal(weights[768, 768], wide)


def _floats(path: Path) -> list[Array]:
    values = graph.load(path).graph.initializers.values()
    return [v.const_value.numpy() for v in values if v.const_value is not None and v.dtype == onnx_ir.DataType.FLOAT]


def test_half_in_storage_computes_in_float32(apply: Apply) -> None:
    made = apply(Half())
    assert {tensor.data_type for tensor in onnx.load(made).graph.initializer} == {
        TensorProto.FLOAT16,
        TensorProto.FLOAT,
        TensorProto.INT64,
    }
    with OnnxPredictor(made) as predictor:
        assert predictor.session.get_inputs()[0].type == "tensor(float)"


def test_half_keeps_what_would_overflow(tmp_path: Path, small: Workload) -> None:
    """A layer whose results pass 65,504 on calibration data stays float32; without that the answer is infinite."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 10)
            with torch.no_grad():
                self.loud.weight.fill_(4000.0)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.quiet(self.loud(image.flatten(1)) / 1e6)

    torch.manual_seed(0)
    loud = replace(small, model=Loud())
    exported = export(loud.build(), loud.inputs, loud.outputs, tmp_path / "loud.onnx")
    (scratch := tmp_path / "scratch").mkdir()
    made = step.apply(Half(compute=True), exported, context(loud, scratch))
    assert distance(made, exported, loud) < 0.01
    stored = {v.dtype for v in graph.load(made).graph.initializers.values() if v.shape == onnx_ir.Shape((64, 64))}
    assert stored == {onnx_ir.DataType.FLOAT}


def test_half_has_one_cast_for_all_readers_of_a_value(tmp_path: Path, small: Workload) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.out = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 10)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.wide(image.flatten(1)).relu()
            return self.out(x.softmax(1) + self.norm(x))

    torch.manual_seed(0)
    forked = replace(small, model=Forked())
    exported = export(forked.build(), forked.inputs, forked.outputs, tmp_path / "forked.onnx")
    (scratch := tmp_path / "scratch").mkdir()
    made = step.apply(Half(compute=True), exported, context(forked, scratch))
    # Nodes in order, and every name written once.
    onnx.checker.check_model(onnx.load(made), full_check=True)
    assert distance(made, exported, forked) < 5e-3


def test_half_computes_in_bfloat16_for_tensorrt_alone() -> None:
    with pytest.raises(BadRecipe, match="onnxruntime has no operators that compute in bfloat16"):
        Recipe((Half(compute=True, dtype="bfloat16"),))


@pytest.mark.parametrize(("device", "computes"), [("cpu", False), ("cuda", True)])
def test_sixteen_bits_compute_where_there_is_a_gpu(device: Literal["cpu", "cuda"], computes: bool) -> None:
    assert Recipe((Half(),), target=Target(device=device)).steps == (Half(compute=computes),)
    assert Recipe((Half(compute=not computes),), target=Target(device=device)).steps == (Half(compute=not computes),)


def rtx(scratch: Path, small: Workload) -> Context:
    return context(small, scratch, Target(device="cuda", runtime="tensorrt", cores=2))


def test_bfloat16_keeps_the_range_of_float32_and_is_rounded_after_each_node(
    small: Workload, tmp_path: Path, exported: Path
) -> None:
    rows = np.array([[3e5, 1.0], [2.0**-30, 2.0]], np.float32)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0, 1 / 3], [1e20, 1.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(torch.tensor([0.1, 0.1]), x, self.weight)

    inputs = (TensorSpec("x", "float32", (BATCH, 2)),)
    path = export(Sum(), inputs, ("y",), tmp_path / "model.onnx")
    drawn = [Batch({"x": rows}, np.zeros(2))]
    workload = replace(
        small, model=Sum, inputs=inputs, outputs=("y",), calibration=lambda: drawn, evaluation=lambda: drawn
    )
    target = Target(device="cuda", runtime="tensorrt", cores=1)
    (scratch := tmp_path / "scratch").mkdir()
    made = step.apply(Half(compute=True, dtype="bfloat16"), path, context(workload, scratch, target))
    with open_graph(made, target) as predictor:
        got = predictor.predict({"x": rows})["y"]
    narrow = [torch.tensor(array).bfloat16() for array in (rows, Sum().weight.detach().numpy(), np.full(2, 0.1))]
    wanted = torch.addmm(narrow[2].float(), narrow[0].float(), narrow[1].float()).bfloat16().float().numpy()
    assert np.array_equal(got, wanted)
    assert got[0, 0] > 65504


def test_a_mask_is_summed_in_float32(small: Workload, tmp_path: Path) -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) / (x > 0).float().sum(1, keepdim=True).clamp(min=1)

    inputs = (TensorSpec("x", "float32", (BATCH, 4), (-1, 1)),)
    rows = [Batch({"x": inputs[0].generate(np.random.default_rng(0), 8)}, np.zeros(8))]
    path = export(Counted(), inputs, ("y",), tmp_path / "model.onnx")
    workload = replace(
        small, model=Counted, inputs=inputs, outputs=("y",), calibration=lambda: rows, evaluation=lambda: rows
    )
    (scratch := tmp_path / "scratch").mkdir()
    made = step.apply(Half(compute=True), path, context(workload, scratch))
    with OnnxPredictor(made) as got, OnnxPredictor(path) as wanted:
        answers = [predictor.predict(rows[0].inputs)["y"] for predictor in (got, wanted)]
    assert np.allclose(*answers, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "stored", "close"),
    [
        (WeightOnly(), onnx_ir.DataType.INT8, 0.01),
        (WeightOnly(weights="int4", block_size="64"), onnx_ir.DataType.INT4, 0.1),
    ],
    ids=str,
)
def test_weights_for_tensorrt_are_standard_pairs(
    config: WeightOnly, stored: onnx_ir.DataType, close: float, small: Workload, exported: Path, tmp_path: Path
) -> None:
    made = step.apply(config, exported, rtx(tmp_path, small))
    model = graph.load(made)
    assert {node.domain for node in model.graph} == {""}
    weights = [node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    assert {value.dtype for value in weights if value is not None} == {stored}
    assert 0 < distance(made, exported, small) < close


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (WeightOnly(symmetric=False), "quantize.weight_only: TensorRT takes no symmetric = false"),
        (WeightOnly(activations="int8"), 'quantize.weight_only: TensorRT takes no activations = "int8"'),
        (WeightOnly(tables="int4"), 'quantize.weight_only: TensorRT takes no tables = "int4"'),
        (Dynamic(), "quantize.dynamic writes integer operators, which TensorRT has not"),
        (Mixed(ranges="dynamic"), "quantize.dynamic writes integer operators, which TensorRT has not"),
    ],
    ids=str,
)
def test_what_tensorrt_has_no_operators_for_is_refused_before_anything_starts(config: Any, said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        Recipe((config,), target=Target(device="cuda", runtime="tensorrt"))


def test_fp8_is_rounded_where_tensorrt_looks_for_it(apply: Apply) -> None:
    model = graph.load(apply(Fp8()))
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm"):
            for value in node.inputs[:2]:
                assert value is not None
                rounding = value.producer()
                assert rounding is not None
                assert rounding.op_type == "DequantizeLinear"
    weights = [value for value in model.graph.initializers.values() if value.dtype == onnx_ir.DataType.FLOAT8E4M3FN]
    assert len(weights) == 4
    assert model.opset_imports[""] == 21


def test_fp8_after_a_relu_is_right_at_every_optimization_level(apply: Apply, small: Workload) -> None:
    """With a zero point ONNX Runtime drops the Relu before the rounding and answers wrongly."""
    import onnxruntime

    made = apply(Fp8())
    batch = next(iter(small.batches("evaluation"))).inputs
    found = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
        found.append(session.run(None, dict(batch))[0])
    # A sum in another order may fall on the other side of a rounding; a lost Relu is off by half of the largest answer.
    assert np.abs(found[0] - found[1]).max() < 0.02 * np.abs(found[0]).max()


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(500, 64), nn.Linear(64, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids).mean(1))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TensorSpec, Any]:
    torch.manual_seed(0)
    spec = TensorSpec("ids", "int64", (BATCH, 6), values=(0, 499))
    module = Embedder()
    with torch.no_grad():
        # Rows of very different sizes, which one scale for the whole table would lose.
        module.table.weight *= torch.logspace(-2, 2, 500)[:, None]
    path = export(module, (spec,), ("logits",), tmp_path_factory.mktemp("embedder") / "model.onnx")
    return path, spec, module


@pytest.mark.parametrize(("tables", "shrinks", "close"), [("int8", 3.0, 0.02), ("int4", 4.5, 0.2)])
def test_tables_have_scales_of_their_own_rows(
    tables: Any, shrinks: float, close: float, embedder: tuple[Path, TensorSpec, Any], small: Workload, tmp_path: Path
) -> None:
    from optimize.judge import ensure
    from optimize.methods.quantize import weight_only

    path = embedder[0]
    private = ensure.copy(path, tmp_path)
    made = weight_only.apply(WeightOnly(weights="float", tables=tables), private, context(small, tmp_path))
    assert path.stat().st_size / made.stat().st_size > shrinks
    with OnnxPredictor(path) as before, OnnxPredictor(made) as after:
        for row in (3, 250, 498):
            ids = {"ids": np.full((1, 6), row)}
            wanted, got = before.predict(ids)["logits"], after.predict(ids)["logits"]
            assert np.abs(got - wanted).max() < close * np.abs(wanted).max()


def test_nothing_left_lists_what_there_was(apply: Apply) -> None:
    for config in (WeightOnly(weights="float"), WeightOnly(exclude=("*",)), Half(exclude=("*",))):
        with pytest.raises(NoEffect, match="left to") as raised:
            apply(config)
        assert "wide/Gemm" in raised.value.fix


def test_activations_stay_float_unless_they_are_asked_to_be_int8(tmp_path: Path) -> None:
    """One channel a hundred times the others: int8 blocks that hold it lose what the others say."""
    torch.manual_seed(0)
    spec = TensorSpec("input", "float32", (BATCH, 4, 512), values=(-1, 1))
    inputs = spec.generate(np.random.default_rng(0), 8)
    inputs[..., 7] *= 100
    module = nn.Sequential(nn.Linear(512, 512, bias=False))
    made = Workload(*("outlier", module, (spec,), ("y",), lambda: [Batch({"input": inputs})], lambda *_: {}))
    path = export(made.build(), made.inputs, made.outputs, tmp_path / "model.onnx")
    with OnnxPredictor(path) as predictor:
        wanted = predictor.predict({"input": inputs})["y"]
    rounded = onnx.load(path)
    (weight,) = [value for value in rounded.graph.initializer if len(value.dims) == 2]
    blocks = onnx.numpy_helper.to_array(weight).T.reshape(512, -1, 32)
    scale = np.abs(blocks).max(2, keepdims=True) / 128
    exact = inputs @ (np.clip(np.rint(blocks / scale), -128, 127) * scale).reshape(512, 512).T
    apart = {}
    for kind in ("float", "int8"):
        folder = tmp_path / kind
        folder.mkdir()
        with OnnxPredictor(step.apply(WeightOnly(activations=kind), path, context(made, folder))) as predictor:
            apart[kind] = relative_error(predictor.predict({"input": inputs})["y"], wanted)
    # No more than the rounding of the weights costs, and a multiple of it.
    assert apart["float"] < 1.1 * relative_error(exact.astype(np.float32), wanted) < 0.006
    assert apart["int8"] > 2 * apart["float"]


@pytest.mark.parametrize("config", [WeightOnly(), Mixed(weight_only=True)], ids=str)
def test_weight_only_is_not_for_openvino(config: Any, exported: Path, small: Workload, tmp_path: Path) -> None:
    target = Target(runtime="openvino")
    with pytest.raises(BadRecipe, match="the target's runtime is openvino"):
        Recipe((config,), target=target)
    with pytest.raises(BadRecipe, match="the target's runtime is openvino"):
        step.apply(config, exported, context(small, tmp_path, target))


def test_ranges_reads_inner_values_and_leaves_the_file(exported: Path, small: Workload, tmp_path: Path) -> None:
    from optimize.judge import ensure

    private = ensure.copy(exported, tmp_path)
    before = private.read_bytes()
    relus = [str(node.outputs[0].name) for node in graph.load(private).graph if node.op_type == "Relu"]
    batches = [batch.inputs for batch in small.batches("calibration")]
    found = largest(private, ["image", *relus], batches)
    assert found["image"] == max(float(batch["image"].max()) for batch in batches)
    assert all(found[name] > 0 for name in relus)
    assert private.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [private.name]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_transpose_before_a_product_in_float16_ends_no_process(
    device: Literal["cpu", "cuda"], small: Workload, tmp_path: Path
) -> None:
    """ONNX Runtime's own optimizer dies of it (its issue 28392); a test that failed would take the others along."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.transpose(0, 1)).transpose(0, 1)

    inputs = (TensorSpec("x", "float32", (BATCH, 5, 64)),)
    rows = [Batch({"x": inputs[0].generate(np.random.default_rng(0), 4)}, np.zeros(4))]
    workload = replace(
        small, model=Turned(), inputs=inputs, outputs=("y",), calibration=lambda: rows, evaluation=lambda: rows
    )
    path = export(workload.build(), inputs, ("y",), tmp_path / "model.onnx")
    target = Target(device=device, cores=1)
    (scratch := tmp_path / "scratch").mkdir()
    made = step.apply(Half(compute=True), path, context(workload, scratch, target))
    assert [onnx_file.in_float16(one) for one in (path, made)] == [False, True]
    with open_graph(made, target) as got, OnnxPredictor(path) as wanted:
        answers = [predictor.predict(rows[0].inputs)["y"] for predictor in (got, wanted)]
    assert relative_error(*answers) < 2e-3
