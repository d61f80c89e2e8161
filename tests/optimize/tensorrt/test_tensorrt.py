"""What is written for TensorRT, and the rules: each with a graph that breaks it. TensorRT itself is not needed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelathe.errors import MachineError
from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.methods.apply import apply
from optimize.methods.export.onnx import export
from optimize.methods.quantize.fp8 import Fp8
from optimize.model.errors import BadBundle, BadGraph
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from optimize.tensorrt import plan, rules
from serve.config import gpu, model_config
from serve.config.target import Target
from tests.optimize.conftest import Optimize

Graph = dict[str, Any]


def constant(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def symmetric() -> Graph:
    """A dense layer in INT8 as TensorRT wants it; the parts by name, so that a test can change one."""
    return {
        "opset": 20,
        "input": TensorProto.FLOAT,
        "constants": {
            "scale": constant("scale", np.float32(0.1)),
            "zero": constant("zero", np.int8(0)),
            "weight": constant("weight", np.ones((4, 3), np.int8)),
            "scales": constant("scales", np.full(3, 0.1, np.float32)),
            "zeros": constant("zeros", np.zeros(3, np.int8)),
        },
        "nodes": {
            "quantize": helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
            "dequantize": helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
            "dense": helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "dense", axis=1),
            "product": helper.make_node("MatMul", ["d", "w"], ["y"], "product"),
        },
    }


def save(parts: Graph, folder: Path) -> Path:
    inputs = [helper.make_tensor_value_info("x", parts["input"], ["batch", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])]
    made = helper.make_graph(list(parts["nodes"].values()), "g", inputs, outputs, list(parts["constants"].values()))
    opsets = [helper.make_opsetid("", parts["opset"]), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def change(kind: str, name: str, value: Any) -> Callable[[Graph], None]:
    return lambda parts: parts[kind].update({name: value})


def uint8(parts: Graph) -> None:
    parts["constants"]["zero"] = constant("zero", np.uint8(0))


def asymmetric(parts: Graph) -> None:
    parts["constants"]["zero"] = constant("zero", np.int8(5))


def per_channel_activation(parts: Graph) -> None:
    parts["constants"]["scale"] = constant("scale", np.full(4, 0.1, np.float32))
    parts["constants"]["zero"] = constant("zero", np.zeros(4, np.int8))


def scales_along_the_inputs(parts: Graph) -> None:
    parts["constants"]["scales"] = constant("scales", np.full(4, 0.1, np.float32))
    parts["constants"]["zeros"] = constant("zeros", np.zeros(4, np.int8))
    parts["nodes"]["dense"] = helper.make_node(
        "DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "dense", axis=0
    )


def quantized_bias(parts: Graph) -> None:
    parts["constants"]["bias"] = constant("bias", np.ones(3, np.int32))
    parts["nodes"]["bias"] = helper.make_node("DequantizeLinear", ["bias", "scales"], ["b"], "bias", axis=0)
    parts["nodes"]["product"] = helper.make_node("MatMul", ["d", "w"], ["p"], "product")
    parts["nodes"]["add"] = helper.make_node("Add", ["p", "b"], ["y"], "add")


def all_float(parts: Graph) -> None:
    parts["constants"] = {"weight": constant("weight", np.ones((4, 3), np.float32))}
    parts["nodes"] = {"product": helper.make_node("MatMul", ["x", "weight"], ["y"], "product")}


def dynamic(parts: Graph) -> None:
    all_float(parts)
    parts["nodes"]["dynamic"] = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], "dynamic")


def microsoft(parts: Graph) -> None:
    parts["nodes"]["product"] = helper.make_node("FusedMatMul", ["d", "w"], ["y"], "product", domain="com.microsoft")


def weight_only(parts: Graph) -> None:
    parts["nodes"]["product"] = helper.make_node("MatMul", ["x", "w"], ["y"], "product")


BROKEN: dict[str, tuple[Callable[[Graph], None], str, str]] = {
    "opset": (lambda parts: parts.update(opset=26), "opset", "model"),
    "types": (lambda parts: parts.update(input=TensorProto.STRING), "types", "x"),
    "dynamic": (dynamic, "operators", "dynamic"),
    "microsoft": (microsoft, "operators", "product"),
    "uint8": (uint8, "signed", "quantize"),
    "no zero point": (
        change("nodes", "quantize", helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], "quantize")),
        "signed",
        "quantize",
    ),
    "asymmetric": (asymmetric, "symmetric", "quantize"),
    "bias": (quantized_bias, "bias", "bias"),
    "scale": (change("constants", "scale", constant("scale", np.float32(0))), "scales", "quantize"),
    "per channel": (per_channel_activation, "per tensor", "quantize"),
    "axis": (scales_along_the_inputs, "channel axis", "dense"),
}
SLOWER = {"weight only": (weight_only, "placement", "product"), "float": (all_float, "precision", "model")}


def test_what_many_nodes_break_is_one_line() -> None:
    found = [rules.Finding("warning", "placement", node, "is slow", "leave it") for node in "abc"]
    found.append(rules.Finding("warning", "precision", "model", "is float", "quantize it"))
    assert list(rules.told(found)) == ["a and 2 more: is slow", "model: is float"]


def test_a_symmetric_graph_breaks_no_rule(tmp_path: Path) -> None:
    assert rules.check(save(symmetric(), tmp_path)) == []
    assert rules.precision(tmp_path / "model.onnx") == "INT8"


def test_fp8_that_states_its_type_in_an_attribute_breaks_no_rule(tmp_path: Path) -> None:
    parts = symmetric()
    for name, data in (("quantize", "x"), ("weight", "weight")):
        target = {"quantize": "q", "weight": "p"}[name]
        parts["nodes"][name] = helper.make_node(
            "QuantizeLinear", [data, "scale"], [target], name, output_dtype=TensorProto.FLOAT8E4M3FN
        )
    parts["constants"]["weight"] = constant("weight", np.ones((4, 3), np.float32))
    parts["nodes"]["dequantize"] = helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], "dequantize")
    parts["nodes"]["dense"] = helper.make_node("DequantizeLinear", ["p", "scale"], ["w"], "dense")
    parts["nodes"]["product"] = parts["nodes"].pop("product")
    assert rules.check(save(parts, tmp_path)) == []


def test_a_convolution_in_fp8_is_none_that_nvidia_documents_for_rtx(small: Workload, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    path = export(small.build(), small.inputs, small.outputs, tmp_path / "model.onnx")
    target = Target(device="cuda", runtime="tensorrt", cores=1)
    made = apply(
        Fp8(), path, Context(small, small.build(), target, 0, tmp_path / "scratch", lambda text, fraction: None)
    )
    found = [(finding.rule, finding.level, finding.node) for finding in rules.check(made)]
    assert found == [("fp8 convolution", "warning", "conv/Conv")]


@pytest.mark.parametrize("name", [*BROKEN, *SLOWER])
def test_each_rule_finds_the_node_that_breaks_it(name: str, tmp_path: Path) -> None:
    break_it, rule, node = {**BROKEN, **SLOWER}[name]
    parts = symmetric()
    break_it(parts)
    findings = rules.check(save(parts, tmp_path))
    found = [finding for finding in findings if finding.rule == rule]
    assert found, findings
    assert found[0].node == node
    assert found[0].level == ("error" if name in BROKEN else "warning")
    assert found[0].what
    assert found[0].fix


@pytest.mark.parametrize(
    ("kind", "axis", "attributes"),
    [("Conv", 0, {}), ("ConvTranspose", 1, {}), ("Gemm", 1, {}), ("Gemm", 0, {"transB": 1})],
)
def test_the_output_channels_of_each_operator(kind: str, axis: int, attributes: dict[str, int], tmp_path: Path) -> None:
    shape = (4, 4, 1, 1) if kind.startswith("Conv") else (4, 4)
    for chosen in (0, 1):
        parts = symmetric()
        parts["constants"]["weight"] = constant("weight", np.ones(shape, np.int8))
        parts["constants"]["scales"] = constant("scales", np.full(4, 0.1, np.float32))
        parts["constants"]["zeros"] = constant("zeros", np.zeros(4, np.int8))
        parts["nodes"]["dense"] = helper.make_node(
            "DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "dense", axis=chosen
        )
        parts["nodes"]["product"] = helper.make_node(kind, ["d", "w"], ["y"], "product", **attributes)
        found = [finding.rule for finding in rules.check(save(parts, tmp_path))]
        assert found == ([] if chosen == axis else ["channel axis"])


@pytest.fixture(scope="module")
def exported(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("exported")
    graph = export(small.build(), small.inputs, small.outputs, folder / "model.onnx")
    return bundles.save(Bundle(small, small.build(), graph), folder / "bundle")


def test_what_is_written_says_the_sizes_of_the_tensorspecs(exported: Bundle, tmp_path: Path) -> None:
    written = plan.write(exported, tmp_path / "trt", build=False, capabilities=())
    assert set(written.files) == {
        "build.py",
        "build.sh",
        "findings.json",
        "onnx/small/1/model.onnx",
        "onnx/small/config.pbtxt",
        "plan/small/config.pbtxt",
    }
    script = (tmp_path / "trt" / "build.sh").read_text()
    assert subprocess.run(["bash", "-n", tmp_path / "trt" / "build.sh"], check=False).returncode == 0
    for option in (
        "--minShapes=image:1x1x8x8",
        "--optShapes=image:8x1x8x8",
        "--maxShapes=image:64x1x8x8",
        "--stronglyTyped",
        "--timingCacheFile=timing.cache",
        "--onnx=onnx/small/1/model.onnx",
        "--saveEngine=plan/small/1/model.plan",
    ):
        assert option in script
    assert [finding.rule for finding in written.findings] == ["precision"]


def test_both_configs_are_triton_configs(exported: Bundle, tmp_path: Path) -> None:
    plan.write(exported, tmp_path / "trt", build=False)
    engine, graph = (
        model_config.parse((tmp_path / "trt" / kind / "small" / "config.pbtxt").read_text())
        for kind in ("plan", "onnx")
    )
    for config in (engine, graph):
        assert config.name == "small"
        assert config.max_batch_size == 64  # what the profile reaches
        assert [list(tensor.dims) for tensor in config.input] == [[1, 8, 8]]
        assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert (engine.backend, engine.default_model_filename, dict(engine.parameters)) == ("tensorrt", "model.plan", {})
    assert graph.backend == "onnxruntime"
    accelerator = graph.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/tmp/tensorrt-small",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/tmp/tensorrt-small",
        "trt_profile_min_shapes": "image:1x1x8x8",
        "trt_profile_opt_shapes": "image:8x1x8x8",
        "trt_profile_max_shapes": "image:64x1x8x8",
    }


def quantized(small: Workload, folder: Path) -> Bundle:
    inputs = (TensorSpec("x", "float32", (BATCH, 4)),)
    return Bundle(replace(small, inputs=inputs, outputs=("y",)), small.build(), save(symmetric(), folder))


def test_the_accelerator_is_told_of_int8(small: Workload, tmp_path: Path) -> None:
    written = plan.write(quantized(small, tmp_path), tmp_path / "trt", build=False)
    assert written.findings == ()
    config = model_config.parse((tmp_path / "trt" / "onnx" / "small" / "config.pbtxt").read_text())
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert accelerator.parameters["precision_mode"] == "INT8"


def test_a_dim_of_its_own_is_in_the_profile_and_fixed_inputs_are_not() -> None:
    tokens = Dim("tokens", 2, 32, 512)
    fixed = TensorSpec("fixed", "float32", (Dim("batch", 1, 1, 1), 3))
    assert gpu.profile([TensorSpec("ids", "int64", (BATCH, tokens)), fixed]) == {
        "ids": {"min": (1, 2), "opt": (8, 32), "max": (64, 512)}
    }


RECORDER = """
import json
from pathlib import Path

calls = {}

class Profile(dict):
    def add(self, name, min, opt, max):
        self[name] = [min, opt, max]

def CreateConfig(profiles, tf32, load_timing_cache):
    calls.update(profiles=profiles, tf32=tf32)

def NetworkFromOnnxPath(path, strongly_typed):
    calls.update(found=Path(path).is_file(), strongly_typed=strongly_typed)

def EngineBytesFromNetwork(network, config, save_timing_cache):
    calls.update(cache=Path(save_timing_cache).name)
    return lambda: json.dumps(calls).encode()
"""


@pytest.fixture
def polygraphy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package in Polygraphy's place that writes what it was called with where the engine would stand."""
    package = tmp_path / "packages" / "polygraphy" / "backend"
    package.mkdir(parents=True)
    (package / "trt.py").write_text(RECORDER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))
    return package / "trt.py"


def test_the_polygraphy_script_asks_for_what_the_tensorspecs_say(
    exported: Bundle, tmp_path: Path, polygraphy: Path
) -> None:
    folder = tmp_path / "trt"
    plan.write(exported, folder, build=False)
    subprocess.run([sys.executable, folder / "build.py"], check=True)
    assert json.loads((folder / "plan" / "small" / "1" / "model.plan").read_bytes()) == {
        "profiles": [{"image": [[1, 1, 8, 8], [8, 1, 8, 8], [64, 1, 8, 8]]}],
        "tf32": True,
        "found": True,
        "strongly_typed": True,
        "cache": "timing.cache",
    }


def test_where_tensorrt_is_there_the_script_is_run(
    exported: Bundle, tmp_path: Path, polygraphy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "missing", lambda: "")
    written = plan.write(exported, tmp_path / "trt")
    assert written.built
    assert "plan/small/1/model.plan" in written.files
    polygraphy.write_text('raise SystemExit("no kernel fits")')
    with pytest.raises(MachineError, match="no kernel fits"):
        plan.write(exported, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_says_what_it_could_not_do(
    exported: Bundle, tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = json.loads(optimize("tensorrt", exported.folder, "--output", tmp_path / "trt", "--json").out)
    assert (result["built"], result["reason"]) == (False, "the package tensorrt is not installed")
    assert result["findings"][0]["rule"] == "precision"


def test_a_graph_that_tensorrt_cannot_take_is_refused_with_every_finding(small: Workload, tmp_path: Path) -> None:
    parts = symmetric()
    uint8(parts)
    bundle = replace(quantized(small, tmp_path), graph=save(parts, tmp_path))
    with pytest.raises(BadGraph, match="quantizes to uint8") as raised:
        plan.write(bundle, tmp_path / "trt")
    assert raised.value.fix == rules.SYMMETRIC
    assert {finding["node"] for finding in raised.value.partial["findings"]} == {"quantize", "dequantize"}
    assert not (tmp_path / "trt").exists()


def test_a_bundle_without_onnx_and_a_folder_of_the_users_are_refused(
    small: Workload, exported: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(BadBundle, match="no ONNX file"):
        plan.write(Bundle(small, small.build()), tmp_path / "trt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BadBundle, match="something else"):
        plan.write(exported, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
