"""TensorRT as a target, on a machine without a GPU: a bundle that is judged on the CPU and compiles, and no speed."""

import json
from pathlib import Path

import pytest
import tomli_w

from loadtest.errors import UsageError
from optimize import bundle as bundles
from optimize import doctor, recipe
from optimize.evaluate import evaluate
from optimize.export.onnx import export
from optimize.predict import open_graph
from optimize.step import METHODS, Context, apply
from optimize.tensorrt import compiler, rules
from optimize.workload import Workload
from serve import model_config
from serve.repository import LINEAGE
from serve.target import Target
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
        ("quantize", "fp8", "FP8"),
        ("quantize", "half", "FP16"),
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


def test_a_person_is_told_so_too(optimize: Optimize, tmp_path: Path) -> None:
    out = optimize("quantize", SOURCE, "--method", "static", *WHERE, "--output", tmp_path / "out").out
    assert "speed is not measured: no GPU here" in out
    assert "A/A" not in out


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
    assert (
        "for TensorRT, judged on a CPU"
        in optimize("run", SOURCE, "--recipe", written(tmp_path), "--output", tmp_path / "run").out
    )


HALF, BFLOAT = {"use": "quantize.half"}, {"use": "quantize.half", "dtype": "bfloat16"}


FOUR = {"use": "quantize.weight_only", "weights": "int4", "block_size": "64"}


@pytest.mark.parametrize(
    ("steps", "precisions"),
    [
        pytest.param([BFLOAT], {"BF16"}, id="bfloat16"),
        pytest.param([*STATIC, HALF], {"INT8", "FP16"}, id="float16 around INT8"),
        pytest.param([{"use": "quantize.fp8"}, HALF], {"FP8"}, id="float16 around FP8"),
        pytest.param([{"use": "quantize.fp8"}, BFLOAT], {"FP8"}, id="bfloat16 around FP8"),
        pytest.param([FOUR, HALF], {"FP16"}, id="float16 and weights in 4 bits"),
    ],
)
def test_sixteen_bits_around_eight_or_four(
    steps: object, precisions: set[str], small: Workload, exported: Path, tmp_path: Path
) -> None:
    asked = recipe.load(written(tmp_path, steps=steps))
    graph = exported
    for config in asked.steps[1:]:
        (scratch := tmp_path / METHODS[type(config)].name).mkdir()
        context = Context(small, small.build(), asked.target, 0, scratch, lambda text, fraction: None)
        graph = apply(config, graph, context)
    found = compiler.compile(graph, small.inputs, tmp_path / "engine", tmp_path / "log")
    assert set(found.layers) == precisions
    scores = []
    for path, target in ((exported, Target()), (graph, asked.target)):
        with open_graph(path, target) as predictor:
            scores.append(evaluate(predictor, small).scores[0].value)
    assert scores[1] > 0.97 * scores[0]


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
