"""OpenVINO as the runtime of a recipe, and NNCF as its quantizer."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from modelathe.commandline import install_line
from modelathe.tensors import BATCH, Arrays, TensorSpec
from optimize.graph import graph
from optimize.judge import measure
from optimize.judge.evaluate import evaluate
from optimize.judge.ruler import Until
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize import nncf
from optimize.methods.table import METHODS
from optimize.model.errors import BadGraph, BadRecipe, MissingExtra
from optimize.predict import runtimes as predict
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.openvino import OpenVinoPredictor
from optimize.runs import pipeline, recipe
from optimize.source.batch import Batch
from optimize.source.load import load_workload
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from serve.config.target import Target
from serve.repository import tree as repository
from tests.optimize.conftest import SMALL, Optimize
from tests.optimize.methods.test_step_contract import context

OPENVINO = Target(runtime="openvino", cores=1)
TOKENS, WIDTH = 8, 32


@pytest.fixture(scope="module")
def exported(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small.build(), small.inputs, small.outputs, tmp_path_factory.mktemp("exported") / "model.onnx")


def save(path: Path, nodes: list[onnx.NodeProto], outputs: str, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Write a graph from `x`, float32 [n, 2], to the named outputs, one letter each."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("theirs", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def test_signals_are_survived_after_two_models(exported: Path) -> None:
    code = (
        "import gc, os, pathlib, signal, sys\n"
        "from optimize.predict.runtimes import OpenVinoPredictor\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "first, second = OpenVinoPredictor(path, cores=1), OpenVinoPredictor(path, cores=1)\n"
        "first.__exit__()\n"
        "del first\n"
        "gc.collect()\n"
        "second.__exit__()\n"
        "del second\n"
        "gc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('survived'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def test_openvino_answers_as_onnx_runtime_does(small: Workload, exported: Path) -> None:
    batch = next(iter(small.batches("evaluation"))).inputs
    with OnnxPredictor(exported, cores=1) as onnxruntime, OpenVinoPredictor(exported, cores=1) as openvino:
        wanted = onnxruntime.predict(batch)["logits"]
        for size in (64, 1, 7, 64):
            answer = openvino.predict({"image": batch["image"][:size]})["logits"]
            # bfloat16 has 8 bits of precision, and OpenVINO computes in it where the CPU can.
            assert np.abs(answer - wanted[:size]).max() < 0.02 * np.abs(wanted).max()


def test_an_answer_outlives_the_next_call(exported: Path) -> None:
    with OpenVinoPredictor(exported) as openvino:
        first = openvino.predict({"image": np.zeros((2, 1, 8, 8), np.float32)})["logits"]
        kept = first.copy()
        openvino.predict({"image": np.ones((2, 1, 8, 8), np.float32)})
    np.testing.assert_array_equal(first, kept)


def test_outputs_keep_their_names_where_openvino_makes_one_of_several(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Neg", ["x"], ["c"])]
    nodes += [helper.make_node("Identity", ["h"], [name]) for name in "ab"]
    with OpenVinoPredictor(save(tmp_path / "model.onnx", nodes, "acb")) as openvino:
        answer = openvino.predict({"x": np.array([[1, -2]], np.float32)})
    assert {name: value.tolist() for name, value in answer.items()} == {"a": [[1, 0]], "c": [[-1, 2]], "b": [[1, 0]]}


def test_what_openvino_cannot_run_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no")
    with pytest.raises(BadGraph, match="OpenVINO cannot load it: Unable to read the model"):
        OpenVinoPredictor(broken)
    unknown = save(tmp_path / "unknown.onnx", [helper.make_node("Wonder", ["x"], ["a"], domain="theirs")], "a")
    with pytest.raises(BadGraph, match=r"No conversion rule found for operations: theirs\.Wonder"):
        OpenVinoPredictor(unknown)
    fine = OpenVinoPredictor(save(tmp_path / "fine.onnx", [helper.make_node("Relu", ["x"], ["a"])], "a"))
    with pytest.raises(BadGraph, match=r"the inputs are \['x'\], given \[\]"):
        fine.predict({})
    with pytest.raises(BadGraph, match="OpenVINO cannot run it"):
        fine.predict({"x": np.zeros((1, 3), np.float32)})
    assert fine.predict({"x": np.ones((1, 2), np.float32)})["a"].tolist() == [[1, 1]]


def test_a_missing_package_is_said_with_the_line_that_installs_it(
    small: Workload, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantize = recipe.parse({"step": [{"use": "quantize.nncf"}]})
    runtime = recipe.parse({"step": [{"use": "export.onnx"}], "target": {"runtime": "openvino"}})
    for attempt in (
        lambda: OpenVinoPredictor(exported),
        lambda: pipeline.run(quantize, small, output=tmp_path / "run"),
        lambda: pipeline.run(runtime, small, output=tmp_path / "run"),
    ):
        with pytest.raises(MissingExtra) as raised:
            attempt()
        assert raised.value.fix == install_line("openvino")
        assert raised.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


def test_openvino_is_for_the_cpu() -> None:
    with pytest.raises(BadRecipe, match="runtime") as raised:
        recipe.parse({"step": [{"use": "export.onnx"}], "target": {"runtime": "openvino", "device": "cuda"}})
    assert "openvino runs on a CPU" in raised.value.fix


def test_the_baseline_stays_in_onnx_runtime(
    small: Workload, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, str]] = []

    def noting(runtime: str) -> Callable[..., Any]:
        kind = predict.RUNTIMES[runtime]

        def make(path: Path, device: str, cores: int) -> Any:
            seen.append((path.parent.name, runtime))
            return kind(path, device, cores)

        return make

    for runtime in list(predict.RUNTIMES):
        monkeypatch.setitem(predict.RUNTIMES, runtime, noting(runtime))  # type: ignore[arg-type]
    files = {"trained": exported, "result": save_copy(exported, tmp_path)}
    target = replace(OPENVINO, batch=(1,))
    measure.speed(files, small.inputs, target, baseline="trained", until=Until(rounds=1, seconds=0.0))
    once, twice = (tmp_path.name, "openvino"), (exported.parent.name, "onnxruntime")
    assert sorted(seen) == sorted([once, twice, twice]), "the baseline again, for the control"


def save_copy(path: Path, folder: Path) -> Path:
    return Path(folder / path.name).write_bytes(path.read_bytes()) and folder / path.name


def test_a_step_is_tried_in_the_runtime_of_the_target(
    small: Workload, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fuse(config: Any, subject: Path, _context: Context) -> Path:
        model = graph.load(subject)
        next(node for node in model.graph if node.op_type == "Relu").domain = "theirs"
        return graph.save(model, subject)

    row = METHODS[nncf.Nncf]
    monkeypatch.setitem(METHODS, nncf.Nncf, replace(row, apply=fuse))  # type: ignore[attr-defined]
    with pytest.raises(BadGraph, match=r"after quantize\.nncf: OpenVINO cannot load it"):
        step.apply(nncf.Nncf(), exported, replace(context(small, tmp_path), target=OPENVINO))


def signed(path: Path) -> Path:
    """Write x · weight with int8 activations, as NNCF does for a transformer."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weight", "step", "zero"], ["dw"]),
        helper.make_node("MatMul", ["dq", "dw"], ["a"]),
    ]
    weight = np.array([[1, -3], [5, 127]], np.int8)
    return save(path, nodes, "a", {"step": np.float32(0.1), "zero": np.int8(0), "weight": weight})


def test_unsigned_activations_are_the_same_values(tmp_path: Path) -> None:
    x = {"x": np.array([[-99, 0.26], [12.7, -12.8], [1, 3]], np.float32)}
    path = signed(tmp_path / "model.onnx")
    with OnnxPredictor(path) as before:
        wanted = before.predict(x)["a"]
    model = graph.load(path)
    nncf.unsign(model)
    graph.save(model, path)
    with OnnxPredictor(path) as after:
        np.testing.assert_allclose(after.predict(x)["a"], wanted, rtol=1e-6)
    assert activation_types(path) == {"UINT8"}
    weights = [node for node in graph.load(path).graph if node.name == "" and node.inputs[0].name == "weight"]
    assert all(node.inputs[2].const_value.dtype.name == "INT8" for node in weights)


def activation_types(path: Path) -> set[str]:
    model = graph.load(path)
    return {str(node.inputs[2].const_value.dtype.name) for node in model.graph if node.op_type == "QuantizeLinear"}  # type: ignore[union-attr]


def rounded_products(path: Path) -> list[str]:
    """Return the products of two activations of which one was rounded."""
    nodes = [node for node in graph.load(path).graph if node.op_type == "MatMul"]
    kinds = {node.name: [_rounded(value) for value in node.inputs] for node in nodes}
    assert any("weight" not in found for found in kinds.values())
    return [str(name) for name, found in kinds.items() if "weight" not in found and "activation" in found]


def _rounded(value: Any) -> str:
    """Return whether a weight or an activation was rounded on the way to `value`; empty when neither was."""
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        node = node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return ""
    return "weight" if node.inputs[0].is_initializer() else "activation"


class Encoder(nn.Module):
    """One layer of a transformer; some channels of its inner activations are a hundred times the others'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.first, self.second, self.norm = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH)
        with torch.no_grad():
            self.first.weight[:2] *= 100
            self.second.weight[:, :2] /= 100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        x = self.norm(x + scores.softmax(-1) @ self.value(x))
        return self.second(torch.relu(self.first(x)))


def batches(seed: int = 0) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for _ in range(4):
        x = rng.normal(size=(16, TOKENS, WIDTH)).astype(np.float32)
        yield Batch({"x": x}, np.zeros(16))


def scores(outputs: Arrays, _targets: Any, reference: Arrays) -> dict[str, np.ndarray]:
    difference = np.abs(outputs["y"] - reference["y"]).mean(axis=(1, 2))
    return {"error": difference / np.abs(reference["y"]).mean()}


@pytest.fixture(scope="module")
def encoder() -> Workload:
    inputs = (TensorSpec("x", "float32", (BATCH, TOKENS, WIDTH)),)
    return Workload(
        *("encoder", Encoder, inputs, ("y",), batches, scores),
        calibration=lambda: batches(1),
        higher_is_better={"error": False},
    )


@pytest.mark.slow
def test_a_transformer_is_quantized_as_one_and_runs_in_both_runtimes(encoder: Workload, tmp_path: Path) -> None:
    path = export(encoder.build(), encoder.inputs, encoder.outputs, tmp_path / "model.onnx")
    with TorchPredictor(encoder.build(), encoder.outputs) as trained:
        reference = evaluate(trained, encoder).outputs
    errors = {}
    for kind in ("auto", "plain"):
        scratch = tmp_path / kind
        scratch.mkdir()
        made = step.apply(nncf.Nncf(model=kind), path, context(encoder, scratch))  # type: ignore[arg-type]
        with OnnxPredictor(made) as onnxruntime, OpenVinoPredictor(made) as openvino:
            answers = [evaluate(runtime, encoder, reference) for runtime in (onnxruntime, openvino)]
        errors[kind] = answers[0].scores[0].value
        assert activation_types(made) == {"UINT8"}
        assert rounded_products(made) == [], "attention products stay float"
        assert answers[1].scores[0].value < 2 * errors[kind] + 0.01
    assert errors["auto"] < 0.8 * errors["plain"], "SmoothQuant takes the outliers"


@pytest.mark.slow
def test_a_convolution_keeps_its_bias(small: Workload, exported: Path, tmp_path: Path) -> None:
    with OnnxPredictor(exported, cores=1) as trained:
        reference = evaluate(trained, small).outputs["logits"]
    made = step.apply(nncf.Nncf(), exported, context(small, tmp_path))
    with OnnxPredictor(made, cores=1) as predictor:
        answer = evaluate(predictor, small).outputs["logits"]
    assert np.abs(answer - reference).mean() < 0.03 * np.abs(reference).mean()


RECIPE = """
[budget]
max_drop = 0.05
[target]
runtime = "openvino"
cores = 1
batch = [32]
[[step]]
use = "quantize.nncf"
[load]
duration = 1.0
concurrency = 4
"""


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_from_the_trained_model_to_a_server_with_openvino(
    optimize: Optimize, tmp_path: Path, openvino_server: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    options = ["--output", tmp_path / "run", "--repository", tmp_path / "repository", "--force", "--json"]
    ended = optimize("run", f"{SMALL}:workload", "--recipe", tmp_path / "recipe.toml", *options)
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document["recipe"]["target"]["runtime"] == "openvino"
    assert document["endpoint"]["parity"]["mismatched"] == 0
    assert document["load"]["requests"]["failed"] == 0
    assert document["endpoint"]["quality"] == pytest.approx(document["result"]["quality"], abs=0.01)
    assert document["ratios"]["size"] > 3.5
    config = repository.config(tmp_path / "repository", "small")
    assert (config.backend, config.default_model_filename) == ("openvino", "model.onnx")
    judged = optimize("evaluate", document["bundle"], "--json")
    assert json.loads(judged.out)["quality"]["value"] == document["result"]["quality"]["value"]


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_one_step_for_openvino(optimize: Optimize, tmp_path: Path) -> None:
    bundle = tmp_path / "made"
    options = ["--method", "nncf", "--runtime", "openvino", "--batch", "8", "--output", bundle, "--json"]
    ended = optimize("quantize", f"{SMALL}:workload", *options)
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    made = load_workload(f"{SMALL}:workload")
    with OpenVinoPredictor(bundle / "model.onnx") as openvino:
        assert document["quality"]["value"] == pytest.approx(evaluate(openvino, made).scores[0].value, abs=0.01)


def test_a_bundle_is_judged_in_the_runtime_that_it_was_made_for(
    small: Workload, exported: Path, tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    class Watched(OpenVinoPredictor):
        def __init__(self, path: Path, device: str = "cpu", cores: int = 0) -> None:
            opened.append(path)
            super().__init__(path, device, cores)

    monkeypatch.setitem(predict.RUNTIMES, "openvino", Watched)
    for runtime in ("openvino", "onnxruntime"):
        lineage = ({"name": "export.onnx", "config": {}, "runtime": runtime},)
        bundles.save(bundles.Bundle(small, small.build(), exported, lineage), tmp_path / runtime)
    judged = json.loads(optimize("evaluate", tmp_path / "openvino", "--json").out)
    assert judged["predictor"] == "openvino"
    assert json.loads(optimize("evaluate", tmp_path / "onnxruntime", "--json").out)["predictor"] == "onnx"
    asked = optimize("evaluate", tmp_path / "openvino", "--predictor", "onnx", "--json")
    assert json.loads(asked.out)["predictor"] == "onnx"
    assert len(opened) == 1
    assert optimize("compare", f"{SMALL}:workload", tmp_path / "openvino", "--json").code == 0
    assert len(opened) == 2


class Looped(nn.Module):
    """Runs one convolution several times, as a refinement does; once it is a residual block."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.into, self.again, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x).relu()
        for _ in range(self.times):
            x = self.again(x).relu() + x
        return self.out(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("times", "config"),
    [(0, nncf.Nncf()), (1, nncf.Nncf()), (2, nncf.Nncf(preset="mixed")), (3, nncf.Nncf(bias_correction="accurate"))],
    ids=["plain", "residual", "twice, mixed", "three times, as asked"],
)
def test_biases_are_corrected_the_fast_way_where_the_accurate_one_fails(
    times: int, config: nncf.Nncf, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spec = TensorSpec("x", "float32", (BATCH, 3, 8, 8), (-1, 1))

    def images(seed: int = 0) -> Iterator[Batch]:
        yield Batch({"x": spec.generate(np.random.default_rng(seed), 16)})

    made = Workload(
        *("looped", Looped(times).eval(), (spec,), ("y",), images, lambda outputs, targets, reference: {}),
        calibration=lambda: images(1),
    )
    said: list[str] = []
    source = export(made.build(), made.inputs, made.outputs, tmp_path / "float.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    path = step.apply(config, source, replace(context(made, scratch), progress=lambda text, _: said.append(text)))
    with OnnxPredictor(path) as predictor:
        got = predictor.predict(made.first())["y"]
    wanted = TorchPredictor(made.build(), made.outputs).predict(made.first())["y"]
    assert np.abs(got - wanted).max() < 0.1 * np.ptp(wanted)
    assert any("it takes the fast one" in line for line in said) == (times > 0)
