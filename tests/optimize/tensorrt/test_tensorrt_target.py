"""TensorRT as a target, on a machine without a GPU: a bundle that is judged on the CPU and compiles, and no speed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn

from modelathe.errors import UsageError
from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.judge.evaluate import evaluate, relative_error
from optimize.machine import doctor
from optimize.methods.apply import apply
from optimize.methods.export.onnx import export
from optimize.methods.table import METHODS
from optimize.model.errors import BadGraph
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.predict.runtimes import open_graph
from optimize.runs import advance, baseline, digest, recipe
from optimize.runs.run import Run
from optimize.source import splits
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from optimize.tensorrt import compiler, rules
from serve.config import gpu, model_config
from serve.config.target import Target
from serve.repository.tree import LINEAGE
from tests.optimize.conftest import SMALL, Optimize

pytestmark = pytest.mark.tensorrt
SOURCE = f"{SMALL}:workload"
WHERE = ("--device", "cuda", "--runtime", "tensorrt", "--batch", "1,8")
STATIC = [{"use": "quantize.static"}]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)


@pytest.fixture(scope="module")
def exported(small: Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small.build(), small.inputs, small.outputs, tmp_path_factory.mktemp("exported") / "model.onnx")


def written(folder: Path, runtime: str = "tensorrt", steps: object = STATIC) -> Path:
    path = folder / "recipe.toml"
    target = {"device": "cuda", "runtime": runtime, "batch": [1, 8]}
    path.write_text(tomli_w.dumps({"seed": 0, "budget": {"keep": 0.5}, "target": target, "step": steps}))
    return path


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_it_runs_on_a_gpu(runtime: str) -> None:
    with pytest.raises(UsageError, match='say device = "cuda"'):
        recipe.build(Target, {"device": "cpu", "runtime": runtime}, "[target]")


@pytest.mark.parametrize(
    ("command", "method", "precision"),
    [
        ("quantize", "static", "INT8"),
        ("export", "onnx", "FP32"),
    ],
)
def test_a_method_ends_with_a_bundle_that_compiles(
    command: str, method: str, precision: str, optimize: Optimize, tmp_path: Path
) -> None:
    ended = optimize(command, SOURCE, "--method", method, *WHERE, "--output", tmp_path / "out", "--json")
    told = json.loads(ended.out)
    assert ended.code == 0, told
    assert told["ratios"]["unmeasured"] == "not measured: no GPU here"
    assert told["ratios"]["throughput"] == {}
    assert told.get("emulated", False) == (command == "quantize" or method == "onnx")
    (gate,) = told["gates"]
    assert gate["passed"]
    assert gate["name"] == "compiles"
    assert f"in {precision}" in gate["measured"]
    assert bundles.load(tmp_path / "out").graph
    assert (tmp_path / "out.compiler.log").is_file()


def test_what_tensorrt_has_no_operators_for_is_refused_by_name(optimize: Optimize, tmp_path: Path) -> None:
    ended = optimize("quantize", SOURCE, *WHERE, "--output", tmp_path / "out")
    assert ended.code == 2
    assert "quantize.dynamic writes integer operators" in ended.err
    assert "use quantize.static" in ended.err


def test_what_tensorrt_would_answer_otherwise_is_no_result(optimize: Optimize, tmp_path: Path) -> None:
    told = ["--method", "static", "--activations", "uint8"]
    ended = optimize("quantize", SOURCE, *told, *WHERE, "--output", tmp_path / "out", "--json")
    assert ended.code == 3
    assert "compiles" in json.loads(ended.out)["error"]["what"]
    assert rules.SYMMETRIC in json.loads(ended.out)["error"]["what"]


def test_a_run_proves_what_it_can_and_says_what_it_cannot(optimize: Optimize, tmp_path: Path) -> None:
    ended = optimize("run", SOURCE, "--recipe", written(tmp_path), "--output", tmp_path / "run", "--json")
    told = json.loads(ended.out)
    assert ended.code == 0
    assert [gate["name"].partition(":")[0] for gate in told["gates"]] == ["quality", "promise", "compiles"]
    assert told["warnings"] == ["speed is not measured: no GPU here"]
    assert told["environment"]["GPU"] == "none"
    page = Path(told["report"]).read_text()
    assert "not measured: no GPU here" in page
    out = optimize("run", SOURCE, "--recipe", written(tmp_path), "--output", tmp_path / "run").out
    assert "for TensorRT, judged on a CPU" in out
    assert "speed is not measured: no GPU here" in out
    assert "A/A" not in out


HALF, BFLOAT = {"use": "quantize.half"}, {"use": "quantize.half", "dtype": "bfloat16"}
FOUR = {"use": "quantize.weight_only", "weights": "int4", "block_size": "64"}


def made_of(
    steps: Sequence[Mapping[str, Any]], workload: Workload, exported: Path, folder: Path
) -> tuple[Path, Target]:
    """Apply the steps after the export one by one; return the file and the target that they were for."""
    asked = recipe.load(written(folder, steps=steps))
    graph = exported
    for config in asked.steps[1:]:
        (scratch := folder / METHODS[type(config)].name).mkdir()
        context = Context(workload, workload.build(), asked.target, 0, scratch, lambda text, fraction: None)
        graph = apply(config, graph, context)
    return graph, asked.target


@pytest.mark.parametrize(
    ("steps", "precisions"),
    [
        pytest.param([BFLOAT], {"BF16"}, id="bfloat16"),
        pytest.param([*STATIC, HALF], {"INT8", "FP16"}, id="float16 around INT8"),
        pytest.param([{"use": "quantize.fp8"}, HALF], {"FP8"}, id="float16 around FP8"),
        pytest.param([{"use": "quantize.fp8"}, BFLOAT], {"FP8"}, id="bfloat16 around FP8"),
        pytest.param([FOUR, HALF], {"FP16"}, id="float16 and weights in 4 bits"),
        pytest.param([{"use": "quantize.nncf"}], {"INT8", "FP32"}, id="NNCF"),
    ],
)
def test_sixteen_bits_around_eight_or_four(
    steps: Sequence[Mapping[str, Any]], precisions: set[str], small: Workload, exported: Path, tmp_path: Path
) -> None:
    graph, target = made_of(steps, small, exported, tmp_path)
    found = compiler.compile(graph, small.inputs, tmp_path / "engine", tmp_path / "log")
    assert set(found.layers) == precisions
    scores = []
    for path, where in ((exported, Target()), (graph, target)):
        with open_graph(path, where) as predictor:
            scores.append(evaluate(predictor, small).scores[0].value)
    assert scores[1] > 0.97 * scores[0]


class Tagger(nn.Module):
    """Looks words up, reads them in order, and has a class for the whole."""

    def __init__(self, recurrent: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.words, self.reader = nn.Embedding(600, 24), recurrent(24, 32, batch_first=True)
        self.out = nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.reader(self.words(ids))[0].mean(1))


@pytest.fixture(scope="module", params=[nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workload, Path]:
    torch.manual_seed(0)
    inputs = (TensorSpec("ids", "int64", (BATCH, Dim("words", 1, 6, 16)), (0, 599)),)
    rng = np.random.default_rng(0)
    drawn = [Batch({"ids": inputs[0].generate(rng, 8)}, rng.integers(0, 64, 8)) for _ in range(4)]
    made = Workload(
        "tagger",
        Tagger(request.param),
        inputs,
        ("y",),
        evaluation=lambda: drawn,
        scores=lambda outputs, labels, reference: {"accuracy": outputs["y"].argmax(1) == labels},
        calibration=lambda: drawn,
        bounded=True,
    )
    return made, export(made.build(), inputs, ("y",), tmp_path_factory.mktemp("tagger") / "model.onnx")


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_over_a_fixed_length_compiles_in_bfloat16(
    layer: type[nn.Module], small: Workload, tmp_path: Path
) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.out = layer(24, 32, batch_first=True), nn.Linear(32, 64)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.out(self.reader(image.squeeze(1))[0][:, -1])

    torch.manual_seed(0)
    inputs = (TensorSpec("image", "float32", (BATCH, 1, 12, 24)),)
    drawn = [Batch({"image": inputs[0].generate(np.random.default_rng(0), 8)}, np.zeros(8))]
    workload = replace(
        small, model=Reader(), inputs=inputs, outputs=("y",), evaluation=lambda: drawn, calibration=lambda: drawn
    )
    path = export(workload.build(), inputs, ("y",), tmp_path / "model.onnx")
    graph, target = made_of([BFLOAT], workload, path, tmp_path)
    assert "BF16" in compiler.compile(graph, inputs, tmp_path / "engine", tmp_path / "log").layers
    with open_graph(graph, target) as predictor, OnnxPredictor(path) as trained:
        answers = [each.predict(drawn[0].inputs)["y"] for each in (predictor, trained)]
    assert 0 < relative_error(*answers) < 0.02


@pytest.mark.parametrize(
    ("steps", "close"),
    [
        ([BFLOAT], 0.02),
        ([*STATIC, HALF], 0.05),
        ([{"use": "quantize.weight_only", "partial": True}, BFLOAT], 0.02),
        ([FOUR | {"partial": True}, HALF], 0.2),
        ([{"use": "quantize.nncf", "partial": True}], 0.05),
    ],
    ids=lambda value: " ".join(str(step["use"]) for step in value) if isinstance(value, list) else "",
)
def test_tables_and_recurrent_layers_compile_in_every_precision(
    steps: Sequence[Mapping[str, Any]], close: float, tagger: tuple[Workload, Path], tmp_path: Path
) -> None:
    workload, exported = tagger
    graph, target = made_of(steps, workload, exported, tmp_path)
    assert compiler.compile(graph, workload.inputs, tmp_path / "engine", tmp_path / "log").bytes
    ids = next(iter(workload.batches("evaluation"))).inputs
    with open_graph(graph, target) as predictor, OnnxPredictor(exported) as trained:
        assert relative_error(predictor.predict(ids)["y"], trained.predict(ids)["y"]) < close


def of_one_layer(inputs: int, folder: Path) -> tuple[Workload, Path]:
    specs = (TensorSpec("x", "float32", (BATCH, inputs)),)
    drawn = [Batch({"x": specs[0].generate(np.random.default_rng(0), 8)}, np.zeros(8, np.int64))]
    torch.manual_seed(0)
    made = Workload(
        *("layer", nn.Sequential(nn.Linear(inputs, 64)), specs, ("y",)),
        evaluation=lambda: drawn,
        scores=lambda outputs, labels, reference: {"accuracy": outputs["y"].argmax(1) == labels},
        bounded=True,
    )
    return made, export(made.build(), specs, ("y",), folder / "model.onnx")


def test_four_bits_come_in_blocks_that_tensorrt_takes(tmp_path: Path) -> None:
    """Its compiler refused 784 inputs in blocks of 64."""
    workload, exported = of_one_layer(112, tmp_path)
    graph, _target = made_of([FOUR], workload, exported, tmp_path)
    assert compiler.compile(graph, workload.inputs, tmp_path / "engine", tmp_path / "log").bytes
    (tmp_path / "other").mkdir()
    workload, exported = of_one_layer(50, tmp_path / "other")
    with pytest.raises(BadGraph, match="has 50 inputs") as refused:
        made_of([FOUR], workload, exported, tmp_path / "other")
    assert "exclude" in str(refused.value.fix)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_publishing_it_asks_for_a_word_that_the_lineage_keeps(
    runtime: str, optimize: Optimize, tmp_path: Path, server_prefix: Path
) -> None:
    options = ["run", SOURCE, "--recipe", written(tmp_path, runtime), "--output", tmp_path / "run"]
    options += ["--repository", tmp_path / "repository", "--json"]
    ended = optimize(*options)
    assert ended.code == 5
    assert "--allow-unmeasured" in json.loads(ended.out)["error"]["fix"]
    assert not (tmp_path / "repository").exists()
    told = json.loads(optimize(*options, "--allow-unmeasured").out)
    assert told["version"]["unmeasured"] == "not measured: no GPU here"
    assert told["endpoint"] is None
    home = tmp_path / "repository" / told["version"]["model"]
    assert json.loads((home / "1" / LINEAGE).read_text())["unmeasured"] == "not measured: no GPU here"
    config = model_config.parse((home / "config.pbtxt").read_text())
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert (config.backend, accelerator.name) == ("onnxruntime", runtime)
    assert accelerator.parameters["precision_mode"] == ("INT8" if runtime == "tensorrt" else "")
    assert "UNMEASURED" in Path(told["report"]).read_text()


def test_a_gpu_that_does_not_work_is_no_machine_without_one(
    optimize: Optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    ended = optimize("quantize", SOURCE, "--method", "static", *WHERE, "--output", tmp_path / "out")
    assert ended.code == 4
    assert "ONNX Runtime has no" in ended.err


def test_a_graph_is_judged_on_the_gpu_that_is_here(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(device="cuda")
    with open_graph(exported, target) as emulated:
        assert emulated.session.get_providers() == ["CPUExecutionProvider"]
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    with pytest.raises(BadGraph, match="CUDAExecutionProvider"):  # there is none, and no CPU takes its place
        open_graph(exported, target)


def test_what_a_cpu_judged_in_a_gpus_place_is_judged_anew_on_the_gpu(
    small: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(
        recipe.load(written(tmp_path, "onnxruntime", [{"use": "quantize.half"}])), target=Target(device="cuda")
    )
    sets = splits.read(small)
    trained = baseline.establish(small, tmp_path / "0-trained", digest.trained(small, sets))

    def entry() -> dict[str, Any]:
        made = advance.every_step(Run(asked, trained, sets, tmp_path))
        return dict(made.bundle.lineage[-1])

    assert entry()["emulated"]
    measured: list[Path] = []
    deviation = advance._deviation
    monkeypatch.setattr(advance, "_deviation", lambda graph, *more: measured.append(graph) or deviation(graph, *more))
    assert entry()["emulated"] and not measured
    # This machine's CPU stands for a GPU that is here now.
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr(OnnxPredictor, "gpu", "CPUExecutionProvider")
    monkeypatch.setattr(gpu, "CUDA", {})
    assert "emulated" not in entry()
    assert len(measured) == 2  # of the export and of the step: a GPU's batches move answers otherwise
