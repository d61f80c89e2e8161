"""A model for TensorRT on a machine without a GPU: no server can load it here, but NVIDIA's compiler is asked."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from serve.config import gpu, model_config
from serve.repository import tree as repository
from serve.server import dryload
from tests.conftest import TINY, save_tiny
from tests.serve.backends.test_backend import save
from tests.serve.commands.test_up import serve

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(gpu.here(), reason="there is a GPU, so that the server itself loads it"),
]


def add(onnx: Path, place: Path, runtime: str = "tensorrt") -> dict[str, object]:
    where = ("--repository", str(place), "--device", "cuda", "--runtime", runtime)
    done = serve("add", str(onnx), "--name", TINY, *where, "--json")
    return {"code": done.returncode, **json.loads(done.stdout)}


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_it_is_compiled_and_says_that_it_was_not_loaded(runtime: str, tmp_path: Path) -> None:
    told = add(save_tiny(tmp_path / "tiny.onnx"), tmp_path / "place", runtime)
    assert told["code"] == 0, told
    assert "not loaded, because there is no GPU here; TensorRT for RTX" in str(told["untried"])
    (finding,) = dryload.findings(tmp_path / "place", TINY)
    assert (finding.level, "compiled it" in finding.what) == ("warning", True)


def test_what_the_compiler_refuses_is_not_added(tmp_path: Path) -> None:
    path = save(
        tmp_path / "integers.onnx",
        [
            ("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            ("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        [("x", onnx.TensorProto.FLOAT, ["batch", 4])],
        [("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        [("unused", np.ones(1, np.float32))],
    )
    told = add(path, tmp_path / "place")
    assert told["code"] == 4
    assert "TensorRT's compiler refuses it: DynamicQuantizeLinear" in str(told["error"])
    assert not (tmp_path / "place" / TINY).exists()


def test_a_profile_that_contradicts_the_graph_is_found(tmp_path: Path) -> None:
    place = tmp_path / "place"
    add(save_tiny(tmp_path / "tiny.onnx"), place)
    config = repository.config(place, TINY)
    parameters = config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    for size in gpu.SIZES:
        parameters[f"trt_profile_{size}_shapes"] = parameters[f"trt_profile_{size}_shapes"].replace("x4", "x5")
    (place / TINY / "config.pbtxt").write_text(model_config.text(config))
    (finding,) = dryload.findings(place, TINY)
    assert "profile has min=5, opt=5, max=5 but tensor has 4" in finding.what


def test_a_profile_that_is_not_stated_is_no_refusal(tmp_path: Path) -> None:
    place = tmp_path / "place"
    add(save_tiny(tmp_path / "tiny.onnx"), place)
    config = repository.config(place, TINY)
    config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters.clear()
    (place / TINY / "config.pbtxt").write_text(model_config.text(config))
    (finding,) = dryload.findings(place, TINY)
    assert (finding.level, "not compiled" in finding.what) == ("warning", True)


@pytest.mark.parametrize("text", ["x:1xfour", "x", "", "y:1x4"])
def test_a_profile_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    add(save_tiny(tmp_path / "tiny.onnx"), place)
    config = repository.config(place, TINY)
    parameters = config.optimization.execution_accelerators.gpu_execution_accelerator[0].parameters
    parameters["trt_profile_min_shapes"] = text
    (place / TINY / "config.pbtxt").write_text(model_config.text(config))
    (finding,) = dryload.findings(place, TINY)
    assert finding.level == "error"
    assert "states no whole profile" in finding.what
