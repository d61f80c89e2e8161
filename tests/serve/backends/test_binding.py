"""Bound runs on the CPU, by the function that GPU instances use, beside plain runs; and a GPU that is not there."""

import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from serve.config.errors import ModelRefused
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny
from tests.serve.backends.test_backend import imported, save

NAMES = {
    np.float16: "FLOAT16", np.float32: "FLOAT", np.float64: "DOUBLE", np.bool_: "BOOL",
    **{kind: np.dtype(kind).name.upper() for kind in (np.int8, np.int16, np.int32, np.int64)},
    **{kind: np.dtype(kind).name.upper() for kind in (np.uint8, np.uint16, np.uint32, np.uint64)},
}  # fmt: skip
OPTIONS = onnxruntime.RunOptions()


class Refused(Exception):
    """Stands for TritonModelException, which exists only inside the server's process."""


@pytest.fixture(scope="module")
def backend() -> Iterator[types.SimpleNamespace]:
    with imported("onnxruntime") as modules:
        modules.warnings = []
        modules.model.pb.Logger = types.SimpleNamespace(log_warn=modules.warnings.append)
        modules.model.pb.TritonModelException = Refused
        yield modules


@pytest.fixture
def session(tmp_path: Path) -> onnxruntime.InferenceSession:
    """Two outputs, x · weight and the rows of a table; the ids must be from 0 to 9."""
    from onnx import TensorProto as T

    save(
        tmp_path / "model.onnx",
        [("MatMul", ["x", "weight"], ["y"]), ("Gather", ["table", "ids"], ["rows"])],
        [("x", T.FLOAT, ["batch", 4]), ("ids", T.INT64, ["batch"])],
        [("y", T.FLOAT, ["batch", 3]), ("rows", T.FLOAT, ["batch", 2])],
        [("weight", TINY_WEIGHT), ("table", np.arange(20, dtype=np.float32).reshape(10, 2))],
    )
    return onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])


def feed(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    return {"x": rng.random((batch, 4), np.float32), "ids": rng.integers(0, 10, batch)}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("batch", [0, 1, 7])
def test_every_type_of_number(backend, tmp_path: Path, dtype: type, batch: int) -> None:
    from onnx import TensorProto

    kind = getattr(TensorProto, NAMES[dtype])
    path = tmp_path / "model.onnx"
    save(path, [("Identity", ["a"], ["b"])], [("a", kind, ["batch", 2])], [("b", kind, ["batch", 2])])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    array = np.random.default_rng(0).integers(0, 2, (batch, 2)).astype(dtype)
    (found,) = backend.binding.run(session, ["b"], {"a": array}, OPTIONS, backend.binding.HOST)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("names", [["y", "rows"], ["rows", "y"], ["rows"]])
def test_answers_are_those_of_a_plain_run(backend, session, batch: int, names: list[str]) -> None:
    found = backend.binding.run(session, names, feed(batch), OPTIONS, backend.binding.HOST)
    for array, wanted in zip(found, session.run(names, feed(batch)), strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_outputs_of_one_run_outlive_the_next(backend, session) -> None:
    (first,) = backend.binding.run(session, ["y"], feed(5), OPTIONS, backend.binding.HOST)
    kept = first.copy()
    for batch in range(1, 9):
        backend.binding.run(session, ["y"], feed(batch), OPTIONS, backend.binding.HOST)
    np.testing.assert_array_equal(first, kept)


def test_arrays_with_gaps_are_taken(backend, session) -> None:
    wide = {"x": np.random.default_rng(0).random((6, 8), np.float32)[::2, ::2], "ids": np.arange(6)[::2]}
    (found,) = backend.binding.run(session, ["y"], wide, OPTIONS, backend.binding.HOST)
    np.testing.assert_array_equal(found, session.run(["y"], wide)[0])


def test_no_outputs(backend, session) -> None:
    assert backend.binding.run(session, [], feed(1), OPTIONS, backend.binding.HOST) == []


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": np.zeros((1, 5), np.float32)}, RuntimeError, "invalid dimensions for input: x"),
        ({"x": np.zeros((1, 4))}, RuntimeError, "input data type"),
        ({"ids": np.array([99])}, RuntimeError, "out of data bounds"),
        ({"z": np.zeros(1)}, RuntimeError, "z"),
        ({"x": None}, ValueError, "the input x is missing"),
    ],
)
def test_what_is_refused(backend, session, change, error, says: str) -> None:
    bad = {name: array for name, array in {**feed(1), **change}.items() if array is not None}
    with pytest.raises(error, match=says):
        backend.binding.run(session, ["y", "rows"], bad, OPTIONS, backend.binding.HOST)


def test_pinned_memory_is_the_default_on_a_gpu(backend) -> None:
    place = backend.binding.outputs_to({}, 1)
    assert (place.device_type(), place.mem_type(), place.vendor_id(), place.device_id()) == (1, 5, 0x10DE, 1)
    off = {"optimization": {"output_pinned_memory": {"enable": False}}}
    assert backend.binding.outputs_to(off, 1) is backend.binding.HOST


def bound(backend, path: Path):
    """An instance that runs on the CPU and binds as one on a GPU does."""
    made = backend.model.TritonPythonModel()
    made.load(str(path), {}, "CPU", 0)
    assert made.place is None
    made.place = backend.binding.HOST
    return made


def test_an_instance_answers_and_refuses_as_without_binding(backend, session, tmp_path: Path) -> None:
    instance = bound(backend, tmp_path / "model.onnx")
    backend.warnings.clear()
    found = instance.run(["y", "rows"], feed(3))
    for name, wanted in zip(found, session.run(["y", "rows"], feed(3)), strict=True):
        np.testing.assert_array_equal(found[name], wanted)
    # The code is what the client's status is made from.
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as refused:
        instance.run(["rows"], {**feed(1), "ids": np.array([99])})
    assert "out of data bounds" in backend.model.public_text(refused.value)
    assert not backend.warnings


def test_a_fault_of_the_binding_is_logged_and_costs_no_answer(backend, session, tmp_path: Path, monkeypatch) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("Failed to find allocator for device")

    instance = bound(backend, tmp_path / "model.onnx")
    monkeypatch.setattr(backend.binding, "run", broken)
    backend.warnings.clear()
    np.testing.assert_array_equal(instance.run(["y"], feed(2))["y"], session.run(["y"], feed(2))[0])
    assert "Failed to find allocator" in backend.warnings[0]


def test_strings_go_without_binding(backend, tmp_path: Path, monkeypatch) -> None:
    from onnx import TensorProto as T

    save(
        tmp_path / "model.onnx",
        [("Identity", ["text"], ["same"])],
        [("text", T.STRING, ["batch", 2])],
        [("same", T.STRING, ["batch", 2])],
    )
    instance = bound(backend, tmp_path / "model.onnx")
    monkeypatch.setattr(backend.binding, "run", None)
    words = np.array([["grün".encode(), b""]], dtype=object)
    np.testing.assert_array_equal(instance.run(["same"], {"text": words})["same"], words)


@pytest.mark.parametrize("accelerator", [[], [{"name": "tensorrt"}]])
def test_a_gpu_that_does_not_start_is_no_reason_to_take_the_cpu(
    backend, tmp_path: Path, no_gpu: None, accelerator
) -> None:
    config = {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": accelerator}}}
    with pytest.raises(Refused, match=r"KIND_GPU asked for, but onnxruntime's .*ExecutionProvider does not start here"):
        backend.model.TritonPythonModel().load(str(save_tiny(tmp_path / "tiny.onnx")), config, "GPU", 0)


def test_the_server_refuses_a_model_for_a_gpu_that_is_not_there(
    server_prefix: Path, tmp_path: Path, no_gpu: None
) -> None:
    place, onnx = tmp_path / "repository", save_tiny(tmp_path / "tiny.onnx")
    with staging.stage(place, TINY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(device="cuda", cores=1)) as staged:
        staging.publish(staged, {})
    says = "model tiny, version 1: instance group tiny of model tiny has kind KIND_GPU but no GPUs are available"
    with pytest.raises(ModelRefused, match=says), running(place, grace=0):
        pass
