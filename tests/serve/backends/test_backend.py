"""The backend behind a real server: one server over models that each stress one thing."""

import importlib.util
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import ModelatheError, RequestRejected
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import model_config
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server.endpoint import Endpoint
from serve.server.install import BACKENDS
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_WEIGHT

SHARED = ("graph", "complete", "binding", "instance")
TABLE = np.arange(30, dtype=np.float32).reshape(10, 3)
IDS, ROWS = TensorSpec("ids", "int64", (BATCH, 1), values=(0, 9)), TensorSpec("rows", "float32", (BATCH, 1, 3))


def save(path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    import onnx
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node(*node[:3], **(node[3] if len(node) > 3 else {})) for node in nodes],
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def publish(place: Path, model: str, onnx: Path, inputs, outputs, delay: int = 0) -> None:
    """Publish with a time in microseconds that the server waits for a batch to fill."""
    with staging.stage(place, model, Source(onnx, inputs, outputs), Target(cores=1)) as staged:
        if delay:
            staged.config.dynamic_batching.max_queue_delay_microseconds = delay
            (staged.path / model / "config.pbtxt").write_text(model_config.text(staged.config))
        staging.publish(staged, {})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path, publish_tiny) -> Iterator[Endpoint]:
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("lab")
    place, onnx = here / "repository", here / "model.onnx"
    save(
        onnx,
        [("Gather", ["table", "ids"], ["rows"])],
        [("ids", T.INT64, ["batch", 1])],
        [("rows", T.FLOAT, ["batch", 1, 3])],
        [("table", TABLE)],
    )
    publish(place, "gather", onnx, [IDS], [ROWS], delay=200_000)
    text = TensorSpec("text", "object", (BATCH, 2))
    save(
        onnx,
        [("Identity", ["text"], ["same"])],
        [("text", T.STRING, ["batch", 2])],
        [("same", T.STRING, ["batch", 2])],
    )
    publish(place, "strings", onnx, [text], [TensorSpec("same", "object", (BATCH, 2))])
    vector = TensorSpec("vector", "float32", (BATCH, Dim("length", 1, 4, 16)))
    save(
        onnx,
        [
            ("ArgMax", ["vector"], ["label"], {"axis": 1, "keepdims": 0}),
            ("ReduceMax", ["vector"], ["top"], {"keepdims": 1}),
        ],
        [("vector", T.FLOAT, ["batch", "length"])],
        [("label", T.INT64, ["batch"]), ("top", T.FLOAT, [1, 1])],
    )
    # `top` is the maximum of the whole batch, no sample's own, so it is left out of what is served.
    publish(place, "label", onnx, [vector], [TensorSpec("label", "int64", (BATCH,))])
    save(
        onnx,
        [("ReduceSum", ["numbers"], ["total"], {"keepdims": 1})],
        [("numbers", T.FLOAT, ["count"])],
        [("total", T.FLOAT, [1])],
    )
    numbers = TensorSpec("numbers", "float32", (Dim("count", 1, 3, 8),))
    publish(place, "unbatched", onnx, [numbers], [TensorSpec("total", "float32", (1,))])
    halves = [("Cast", ["a"], ["half"], {"to": T.FLOAT16}), ("Not", ["b"], ["not_b"])]
    save(
        onnx,
        halves,
        [("a", T.DOUBLE, ["batch", 1]), ("b", T.BOOL, ["batch", 1])],
        [("half", T.FLOAT16, ["batch", 1]), ("not_b", T.BOOL, ["batch", 1])],
    )
    pair = [TensorSpec("a", "float64", (BATCH, 1)), TensorSpec("b", "bool", (BATCH, 1))]
    publish(
        place, "pair", onnx, pair, [TensorSpec("half", "float16", (BATCH, 1)), TensorSpec("not_b", "bool", (BATCH, 1))]
    )
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_answers_are_the_models(endpoint: Endpoint, scheme: str) -> None:
    x = np.random.default_rng(0).random((5, 4), dtype=np.float32)
    with connect(getattr(endpoint, scheme)) as client:
        answer = client.infer(TINY, {"x": x})
    assert list(answer) == ["y"]
    np.testing.assert_allclose(answer["y"], x @ TINY_WEIGHT, rtol=1e-6)


def ask_at_once(endpoint: Endpoint, model: str, requests: list[dict[str, np.ndarray]]) -> list[object]:
    """Send the requests together, each from a thread of its own; an error stands in the place of an answer."""

    def ask(inputs: dict[str, np.ndarray]) -> object:
        with connect(endpoint.grpc) as client:
            try:
                return client.infer(model, inputs)
            except ModelatheError as error:
                return error

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, requests))


def test_requests_of_mixed_sizes_share_a_batch(lab: Endpoint) -> None:
    rng = np.random.default_rng(1)
    requests = [{"ids": rng.integers(0, 10, (size, 1))} for size in (1, 3, 2, 5, 1, 4)]
    with connect(lab.grpc) as client:
        before = counts.counted(client, "gather")
        answers = ask_at_once(lab, "gather", requests)
        counted = counts.counted(client, "gather") - before
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(answer["rows"], TABLE[request["ids"]])
    assert counted.success == len(requests)
    assert counted.execution_count < len(requests)


def test_a_bad_request_does_not_poison_its_batch(lab: Endpoint) -> None:
    requests = [{"ids": np.array([[number]])} for number in (1, 2, 99, 3, 4)]
    with connect(lab.grpc) as client:
        before = counts.counted(client, "gather")
        answers = ask_at_once(lab, "gather", requests)
        counted = counts.counted(client, "gather") - before
    refused = answers.pop(2)
    assert isinstance(refused, RequestRejected)
    assert "out of data bounds" in refused.what
    assert "/" not in refused.what
    assert "Traceback" not in refused.what
    for number, answer in zip((1, 2, 3, 4), answers, strict=True):
        np.testing.assert_array_equal(answer["rows"], TABLE[[[[number]]]][0])
    assert counted.execution_count < len(requests)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((1, 5), np.float32)},
        {"x": np.zeros((1, 4), np.float64)},
        {"x": np.zeros((1, 4, 1), np.float32)},
        {"x": np.zeros((33, 4), np.float32)},
        {"z": np.zeros((1, 4), np.float32)},
        {"x": np.zeros((1, 4), np.float32), "z": np.zeros((1, 4), np.float32)},
    ],
    ids=["shape", "dtype", "rank", "batch", "name", "extra"],
)
def test_bad_request_is_refused_and_the_next_is_answered(endpoint: Endpoint, scheme: str, inputs) -> None:
    with connect(getattr(endpoint, scheme)) as client:
        with pytest.raises(RequestRejected):
            client.infer(TINY, inputs)
        assert client.infer(TINY, {"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)


def test_strings(lab: Endpoint) -> None:
    words = np.array([["grün".encode(), b""], [b"a", b"bc"]], dtype=object)
    with connect(lab.http) as client:
        np.testing.assert_array_equal(client.infer("strings", {"text": words})["same"], words)


def test_bytes_that_are_no_text_are_refused(lab: Endpoint) -> None:
    with connect(lab.http) as client, pytest.raises(RequestRejected, match="utf-8"):
        client.infer("strings", {"text": np.array([[b"\xff", b""]], dtype=object)})


def test_output_without_dims_of_its_own(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        answer = client.infer("label", {"vector": np.array([[1, 5, 2], [7, 0, 1]], np.float32)})
    assert answer["label"].ravel().tolist() == [1, 0]


def test_unbatched_model(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        answer = client.infer("unbatched", {"numbers": np.array([1, 2, 4], np.float32)})
    assert answer["total"].ravel().tolist() == [7]


def test_half_double_and_bool(lab: Endpoint) -> None:
    with connect(lab.http) as client:
        answer = client.infer("pair", {"a": np.array([[0.5], [2.0]]), "b": np.array([[True], [False]])})
    assert answer["half"].dtype == np.float16
    assert answer["half"].ravel().tolist() == [0.5, 2.0]
    assert answer["not_b"].ravel().tolist() == [False, True]


def test_only_the_outputs_that_were_asked_for(lab: Endpoint) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    a = InferInput("a", [1, 1], "FP64").set_data_from_numpy(np.zeros((1, 1)))
    b = InferInput("b", [1, 1], "BOOL").set_data_from_numpy(np.zeros((1, 1), bool))
    client = InferenceServerClient(lab.http.removeprefix("http://"))
    answer = client.infer("pair", [a, b], outputs=[InferRequestedOutput("not_b")]).get_response()
    client.close()
    assert [output["name"] for output in answer["outputs"]] == ["not_b"]


@contextmanager
def imported(runtime: str) -> Iterator[types.SimpleNamespace]:
    """The modules of a backend, with NVIDIA's module replaced: it exists only inside the server's process."""
    sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
    try:
        made = {}
        shared = {name: BACKENDS / f"{name}.py" for name in SHARED}
        for name, path in {**shared, "model": BACKENDS / runtime / "model.py"}.items():
            specification = importlib.util.spec_from_file_location(name, path)
            made[name] = sys.modules[name] = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(made[name])
        yield types.SimpleNamespace(**made)
    finally:
        for name in ("triton_python_backend_utils", *SHARED, "model"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def backend() -> Iterator[types.SimpleNamespace]:
    with imported("onnxruntime") as modules:
        yield modules


GOOD = {
    "input": [{"name": "x", "data_type": "TYPE_FP32"}],
    "output": [{"name": "y", "data_type": "TYPE_FP32"}],
    "sequence_batching": {"state": []},
    "optimization": {"execution_accelerators": {"gpu_execution_accelerator": []}},
}


def test_what_the_backend_refuses(backend) -> None:
    assert backend.instance.refusal(GOOD, "1.26.4") is None
    assert "numpy 2.4.6" in backend.instance.refusal(GOOD, "2.4.6")
    accelerated = {"execution_accelerators": {"cpu_execution_accelerator": [{"name": "openvino"}]}}
    for change, word in [
        ({"output": [{"name": "y", "data_type": "TYPE_BF16"}]}, "BF16"),
        ({"model_transaction_policy": {"decoupled": True}}, "decoupled"),
        ({"batch_input": [{"kind": "BATCH_ITEM_SHAPE"}]}, "batch_input"),
        ({"batch_output": [{"kind": "BATCH_SCATTER_WITH_INPUT_SHAPE"}]}, "batch_output"),
        ({"input": [{"name": "x", "data_type": "TYPE_FP32", "allow_ragged_batch": True}]}, "ragged"),
        ({"optimization": accelerated}, "accelerators"),
        ({"model_operations": {"op_library_filename": ["a.so"]}}, "operator libraries"),
        ({"input": []}, "must be listed"),
    ]:
        assert word in backend.instance.refusal({**GOOD, **change}, "1.26.4")


def test_client_texts_carry_no_paths(backend) -> None:
    error = RuntimeError(
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
        "Name:'secret_layer' Status Message: /build/onnxruntime/core/gather.cc:12 idx=99 must be within [-10,9]"
    )
    assert backend.model.public_text(error) == "idx=99 must be within [-10,9]"
    assert backend.model.public_text(KeyError()) == "KeyError"


def test_parameters_become_the_sessions_options(backend, tmp_path: Path) -> None:
    ort, file = backend.model.ort, tmp_path / "model.onnx"
    file.write_bytes(b"a graph in float32")
    stated = {
        "intra_op_thread_count": "3",
        "inter_op_thread_count": "2",
        "execution_mode": "1",
        "enable_mem_arena": "0",
        "enable_mem_pattern": "0",
        "session.intra_op.allow_spinning": "0",
    }
    parameters = {key: {"string_value": value} for key, value in stated.items()}
    asked = {"parameters": parameters, "optimization": {"graph": {"level": 2}}}
    options = backend.model._session_options(file, asked)
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    levels = {0: "ORT_ENABLE_ALL", -1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
    for level, name in levels.items():
        made = backend.model._session_options(file, {"optimization": {"graph": {"level": level}}})
        assert made.graph_optimization_level == getattr(ort.GraphOptimizationLevel, name)
