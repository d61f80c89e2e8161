"""What NVIDIA's own compiler says of graphs, of ours and of broken ones: it needs no GPU, and is asked itself."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from modelathe import interpreter
from modelathe.commandline import install_line
from modelathe.errors import MachineError, UsageError
from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.graph import graph as graphs
from optimize.machine import extra
from optimize.methods.apply import apply, for_target
from optimize.methods.export.onnx import export
from optimize.methods.table import NAMES
from optimize.model.errors import BadBundle, BadGraph, MissingExtra
from optimize.source.workload import Workload
from optimize.step.bundle import Bundle
from optimize.step.contract import Context
from optimize.tensorrt import compiler, plan, rules
from serve.config.target import Target
from serve.tensorrt import ask, build
from tests.optimize.conftest import Optimize
from tests.optimize.tensorrt.test_tensorrt import (
    BROKEN,
    SLOWER,
    Graph,
    constant,
    exported,
    microsoft,
    quantized,
    save,
    symmetric,
    uint8,
)

pytestmark = pytest.mark.tensorrt
__all__ = ["exported"]

X = (TensorSpec("x", "float32", (BATCH, 4)),)
SILENT = {"signed", "per tensor", "channel axis", "opset"}
"""Rules about what this compiler takes and computes otherwise or slower, or what TensorRT's older parsers refuse."""


def verdict(path: Path, folder: Path, *capabilities: str) -> str:
    """Return what the compiler refuses a graph for; nothing where it compiles."""
    try:
        compiler.compile(path, X, folder / "model.engine", folder / "log", capabilities or ("8.9",))
    except BadGraph as failure:
        return f"{failure.what}; {failure.fix}"
    return ""


def test_a_graph_in_int8_compiles_and_says_what_computes_in_what(tmp_path: Path) -> None:
    found = compiler.compile(save(symmetric(), tmp_path), X, tmp_path / "model.engine", tmp_path / "log")
    assert (tmp_path / "model.engine").stat().st_size == found.bytes > 0
    assert found.layers == {"INT8": 1}
    assert found.float32 == ()
    assert (tmp_path / "log").stat().st_size > 0


@pytest.mark.parametrize("name", [*BROKEN, *SLOWER])
def test_rules_and_compiler_agree(name: str, tmp_path: Path) -> None:
    break_it, rule, node = {**BROKEN, **SLOWER}[name]
    parts = symmetric()
    break_it(parts)
    said = verdict(save(parts, tmp_path), tmp_path)
    assert bool(said) == (name in BROKEN and rule not in SILENT), said
    if said and node != "model":
        assert node in said


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from([np.int8, np.uint8]),
    zero=st.sampled_from([0, 3]),
    scale=st.sampled_from([0.1, 0.0, -0.1]),
    weights=st.sampled_from([0.1, 0.0]),
    bias=st.booleans(),
    opset=st.sampled_from([13, 17, 20]),
)
def test_what_the_rules_pass_compiles_and_what_they_refuse_does_not(
    kind: Any, zero: int, scale: float, weights: float, bias: bool, opset: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("generated")
    parts: Graph = symmetric() | {"opset": opset}
    parts["constants"]["zero"] = constant("zero", kind(zero))
    parts["constants"]["scale"] = constant("scale", np.float32(scale))
    parts["constants"]["scales"] = constant("scales", np.array([0.1, weights, 0.1], np.float32))
    if bias:
        BROKEN["bias"][0](parts)
    path = save(parts, folder)
    errors = [finding for finding in rules.check(path) if finding.level == "error" and finding.rule not in SILENT]
    assert bool(verdict(path, folder)) == bool(errors), errors


class Determinant(nn.Module):
    """Has an operator that TensorRT lacks, beside layers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(4, 9), nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.linalg.det(self.body(x).relu().reshape(-1, 3, 3))[:, None])


@pytest.fixture(scope="module")
def determinant(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("determinant")
    workload = replace(small, inputs=X, outputs=("y",))
    module = Determinant().eval()
    return Bundle(workload, module, export(module, X, ("y",), folder / "model.onnx"))


def test_an_operator_that_tensorrt_lacks_is_named_and_the_way_out_works(determinant: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadGraph, match=r"Det: TensorRT has no Det") as raised:
        plan.write(determinant, tmp_path / "trt", build=False)
    assert raised.value.fix.endswith("--partial")
    assert not (tmp_path / "trt").exists()
    written = plan.write(determinant, tmp_path / "trt", build=False, partial=True)
    assert set(written.files) == {"findings.json", "onnx/small/1/model.onnx", "onnx/small/config.pbtxt"}
    assert written.taken is not None
    taken, nodes, parts = written.taken
    assert (nodes - taken, parts) == (1, 2)


def test_a_folder_of_the_users_with_such_names_is_not_replaced(determinant: Bundle, tmp_path: Path) -> None:
    theirs = tmp_path / "models" / "onnx" / "mine.onnx"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(BadBundle, match="holds something else"):
        plan.write(determinant, tmp_path / "models", partial=True)
    assert theirs.read_text() == "mine"
    for _ in range(2):
        plan.write(determinant, tmp_path / "trt", partial=True)


def test_partial_lets_no_wrong_answer_pass(small: Workload, tmp_path: Path) -> None:
    parts = symmetric()
    uint8(parts)
    bundle = replace(quantized(small, tmp_path), graph=save(parts, tmp_path))
    with pytest.raises(BadGraph, match="uint8"):
        plan.write(bundle, tmp_path / "trt", partial=True)


def test_an_operator_of_onnx_runtime_is_named(tmp_path: Path) -> None:
    parts = symmetric()
    microsoft(parts)
    assert "product: FusedMatMul is no operator of ONNX" in verdict(save(parts, tmp_path), tmp_path)


def test_a_plan_where_a_bundle_is_wanted(tmp_path: Path, optimize: Optimize) -> None:
    (tmp_path / "model.plan").write_bytes(b"ftrt and then some")
    ended = optimize("tensorrt", tmp_path / "model.plan", "--output", tmp_path / "trt")
    assert ended.code == 4
    assert "model.plan: is not a bundle" in ended.err
    assert "give a folder that optimize has written" in ended.err


@pytest.mark.parametrize("method", ["half", "static", "fp8", "weight_only"])
def test_weights_in_a_second_file_reach_the_engine(
    method: str, small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a graph past 2 GB, which is no case for each run of the tests."""
    monkeypatch.setattr(graphs, "LARGEST_FILE", 10_000)
    (tmp_path / "scratch").mkdir()
    path = export(small.build(), small.inputs, small.outputs, tmp_path / "model.onnx")
    target = Target(device="cuda", runtime="tensorrt", cores=1)
    config = for_target(NAMES[f"quantize.{method}"](), target)
    context = Context(small, small.build(), target, 0, tmp_path / "scratch", lambda text, fraction: None)
    made = apply(config, path, context)
    assert made.with_name(f"{made.name}.data").stat().st_size > 10_000
    assert compiler.compile(made, small.inputs, tmp_path / "model.engine", tmp_path / "log").bytes > 100_000


def test_a_profile_that_contradicts_the_graph(tmp_path: Path) -> None:
    other = (TensorSpec("x", "float32", (BATCH, 5)),)
    with pytest.raises(BadGraph, match=r"min=5, opt=5, max=5 but tensor has 4"):
        compiler.compile(save(symmetric(), tmp_path), other, tmp_path / "model.engine", tmp_path / "log")


def fp8(folder: Path) -> Path:
    parts = symmetric()
    kind = {"output_dtype": TensorProto.FLOAT8E4M3FN}
    parts["opset"] = 21
    parts["constants"] = {"scale": constant("scale", np.float32(0.1)), "w": constant("w", np.ones((4, 3), np.float32))}
    nodes = [
        *(helper.make_node("QuantizeLinear", [data, "scale"], [f"{data}_q"], f"q_{data}", **kind) for data in "xw"),
        *(helper.make_node("DequantizeLinear", [f"{data}_q", "scale"], [f"{data}_d"], f"d_{data}") for data in "xw"),
        helper.make_node("MatMul", ["x_d", "w_d"], ["y"], "product"),
    ]
    parts["nodes"] = {node.name: node for node in nodes}
    return save(parts, folder)


def test_a_gpu_without_fp8_is_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(BadGraph, match=r"has FP8, which GPUs of compute capability 8\.6 cannot compute"):
        compiler.compile(fp8(tmp_path), X, tmp_path / "model.engine", tmp_path / "log", ("8.6", "8.9"))
    assert not verdict(fp8(tmp_path), tmp_path, "8.9")


@pytest.mark.parametrize("name", ["9.0", "sm89"])
def test_a_capability_that_it_does_not_know(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name} is not known"):
        compiler.compile(save(symmetric(), tmp_path), X, tmp_path / "model.engine", tmp_path / "log", (name,))


def test_current_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stands alone"):
        compiler.compile(save(symmetric(), tmp_path), X, tmp_path / "e", tmp_path / "log", ("current", "8.9"))


def test_several_sizes_are_in_the_engines_profile(tmp_path: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(1)

    inputs = (TensorSpec("x", "float32", (BATCH, Dim("tokens", 2, 8, 64), 4)),)
    path = export(Mean().eval(), inputs, ("y",), tmp_path / "model.onnx")
    found = compiler.compile(path, inputs, tmp_path / "model.engine", tmp_path / "log", ("7.5", "12.0"))
    assert found.capabilities == ("7.5", "12.0")
    assert found.layers == {}


def test_the_command_prints_what_it_found_and_nothing_of_the_compiler(
    exported: Bundle, tmp_path: Path, optimize: Optimize
) -> None:
    told = json.loads(optimize("tensorrt", exported.folder, "--output", tmp_path / "trt", "--json").out)
    assert list(told["compiled"]["layers"]) == ["FP32"]
    assert "rtx/small.engine" in told["files"]
    assert told["compiled"]["log"] == str(tmp_path / "trt.compiler.log")
    command = [sys.executable, "-m", "optimize", "tensorrt", exported.folder, "--output", tmp_path / "trt"]
    ended = subprocess.run([*command, "--capability", "12.0"], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert [line for line in lines if "for compute capability 12.0" in line and " in FP32" in line]
    assert len(lines) == 5, ended.stdout
    assert ended.stderr == ""


def test_without_the_compiler_the_rules_are_checked_and_the_line_that_installs_it_is_said(
    exported: Bundle, tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extra.PACKAGES, "tensorrt", ("nowhere",))
    monkeypatch.setattr(ask, "there", lambda: False)
    out = optimize("tensorrt", exported.folder, "--output", tmp_path / "trt").out
    assert f"not compiled, because the compiler is not installed: {install_line('tensorrt')}" in out
    with pytest.raises(MissingExtra):
        compiler.compile(save(symmetric(), tmp_path), X, tmp_path / "e", tmp_path / "log")
    uncompiled = optimize("tensorrt", exported.folder, "--output", tmp_path / "trt", "--no-compile").out
    assert "not compiled, because it was not asked for" in uncompiled


def staged(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Let another program run in the compiler's place."""
    program = folder / "program.py"
    program.write_text(code)
    monkeypatch.setattr(interpreter, "command", lambda *_: [sys.executable, str(program)])


def test_a_compiler_that_crashes_leaves_a_line_and_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, tmp_path, "import os, signal; print('the last words', flush=True); os.kill(os.getpid(), 11)")
    with pytest.raises(MachineError, match=r"ended without an answer \(SIGSEGV\)") as raised:
        compiler.compile(save(symmetric(), tmp_path), X, tmp_path / "model.engine", tmp_path / "log")
    assert str(tmp_path / "log") in raised.value.fix
    assert "the last words" in (tmp_path / "log").read_text()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "place"
    bundle.mkdir()
    with pytest.raises(MachineError, match="the engine could not be written: No space left on device"):
        compiler.compile(save(symmetric(), bundle), X, Path("/dev/full"), tmp_path / "log")


def test_ctrl_c_during_a_build_leaves_neither_a_process_nor_a_folder(exported: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "optimize", "tensorrt", str(exported.folder), "--output", "trt"]
    env = os.environ | {"PYTHONPATH": interpreter.path()}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as running:
        log, end = tmp_path / "trt.compiler.log", time.monotonic() + 60
        while not log.is_file() and time.monotonic() < end:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "trt").exists()
    assert not list(tmp_path.glob(".trt*"))
    found = subprocess.run(["pgrep", "-f", "serve.tensorrt.build"], capture_output=True, text=True, check=False)
    assert not [pid for pid in found.stdout.split() if Path(f"/proc/{pid}/cwd").resolve() == tmp_path]


def test_another_tensorrt_in_this_process_is_nothing_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = type(sys)("tensorrt_rtx")
    stranger.__spec__ = importlib.machinery.ModuleSpec("tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stranger)
    assert not verdict(save(symmetric(), tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        (
            "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported.",
            "Non-zero zero point is not supported",
        ),
        (
            'Assertion failed: convertDtype(type, &trt) && "Failed to convert ONNX date type to TensorRT data type."',
            "Failed to convert ONNX date type to TensorRT data type",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Dimension mismatch for tensor x and "
            "profile 0. At dimension axis 1, profile has min=5, opt=5, max=5 but tensor has 4. In validate at "
            "/_src/optimizer/api/network.cpp:4054)",
            "Dimension mismatch for tensor x and profile 0. At dimension axis 1, profile has min=5, opt=5, max=5 but "
            "tensor has 4",
        ),
        (
            "b: input has type Int32 but must have type FP8. In checkType at /_src/nodeBase.cpp:456) [x.cpp::e::250] "
            "Error Code 1: Cuda Runtime (In catchCudaError at /_src/checkMacros.cpp:250 (cudaError 35: no driver)",
            "b: input has type Int32 but must have type FP8",
        ),
        ("it says\n something new", "it says something new"),
    ],
)
def test_messages_without_the_compilers_inside(said: str, plain: str) -> None:
    assert ask.plain(said) == plain


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not onnx")
    order = {"graph": str(path), "engine": "", "profiles": {}, "capabilities": ["SM89"], "sparse": False}
    answer = json.loads(_child({**order, "parts": False}, tmp_path).read_text())
    assert answer["errors"][0]["code"] == "MODEL_DESERIALIZE_FAILED"


def _child(order: dict[str, Any], folder: Path) -> Path:
    answer = folder / "answer.json"
    order = {**order, "answer": str(answer)}
    command = interpreter.command(build.__name__)
    subprocess.run(
        command, input=json.dumps(order), text=True, check=True, env=interpreter.variables(), capture_output=True
    )
    return answer


def test_a_conv_is_in_the_precision_of_both_its_sides() -> None:
    def layer(name: str, kind: str, inputs: list[Any], outputs: list[Any]) -> dict[str, Any]:
        return {"name": name, "kind": kind, "inputs": inputs, "outputs": outputs}

    quantized = [
        layer("dx", "DEQUANTIZE", [["xq", "INT8"]], [["x", "FLOAT"]]),
        layer("dw", "DEQUANTIZE", [["wq", "INT8"]], [["w", "FLOAT"]]),
        layer("turned", "SHUFFLE", [["w", "FLOAT"]], [["wt", "FLOAT"]]),
    ]
    layers = [
        *quantized,
        layer("int8", "CONVOLUTION", [["x", "FLOAT"], ["wt", "FLOAT"]], [["a", "FLOAT"]]),
        layer("weight only", "MATRIX_MULTIPLY", [["h", "HALF"], ["wt", "HALF"]], [["b", "HALF"]]),
        layer("float", "CONVOLUTION", [["a", "FLOAT"], None], [["c", "FLOAT"]]),
        layer("none", "ACTIVATION", [["c", "FLOAT"]], [["d", "FLOAT"]]),
    ]
    assert compiler.precisions(layers) == {"int8": "INT8", "weight only": "FP16", "float": "FP32"}
