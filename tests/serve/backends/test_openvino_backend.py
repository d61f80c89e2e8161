"""The openvino backend behind a real server, and what is said where the server has none."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import RequestRejected
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import model_config
from serve.config.errors import ModelRefused, NotInstalled
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server import install
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.conftest import TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny
from tests.serve.backends.test_backend import GOOD, IDS, ROWS, TABLE, ask_at_once, imported, save

OPENVINO = Target(runtime="openvino", cores=1)
LENGTH = Dim("length", 1, 4, 16)


def publish(place: Path, model: str, onnx: Path, inputs, outputs, delay: int = 0) -> None:
    with staging.stage(place, model, Source(onnx, inputs, outputs), OPENVINO) as staged:
        if delay:
            staged.config.dynamic_batching.max_queue_delay_microseconds = delay
            (staged.path / model / "config.pbtxt").write_text(model_config.text(staged.config))
        staging.publish(staged, {})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, openvino_server: Path) -> Iterator[Endpoint]:
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("lab")
    place, onnx = here / "repository", here / "model.onnx"
    publish(place, "tiny", save_tiny(onnx), TINY_INPUTS, TINY_OUTPUTS)
    save(
        onnx,
        [("Gather", ["table", "ids"], ["rows"])],
        [("ids", T.INT64, ["batch", 1])],
        [("rows", T.FLOAT, ["batch", 1, 3])],
        [("table", TABLE)],
    )
    publish(place, "gather", onnx, [IDS], [ROWS], delay=200_000)
    save(
        onnx,
        [("ArgMax", ["vector"], ["label"], {"axis": 1, "keepdims": 0}), ("Neg", ["vector"], ["negative"])],
        [("vector", T.FLOAT, ["batch", "length"])],
        [("label", T.INT64, ["batch"]), ("negative", T.FLOAT, ["batch", "length"])],
    )
    vector = TensorSpec("vector", "float32", (BATCH, LENGTH))
    outputs = [TensorSpec("negative", "float32", (BATCH, LENGTH)), TensorSpec("label", "int64", (BATCH,))]
    publish(place, "label", onnx, [vector], outputs)
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_answers_are_the_models(lab: Endpoint, scheme: str) -> None:
    x = np.random.default_rng(0).random((5, 4), dtype=np.float32)
    with connect(getattr(lab, scheme)) as client:
        answer = client.infer("tiny", {"x": x})
    # bfloat16, where the CPU has it, has 8 bits of precision.
    np.testing.assert_allclose(answer["y"], x @ TINY_WEIGHT, rtol=0.02)


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


def test_lengths_and_types_and_the_order_of_outputs(lab: Endpoint) -> None:
    with connect(lab.http) as client:
        for length in (3, 16, 1):
            vector = np.random.default_rng(length).normal(size=(2, length)).astype(np.float32)
            answer = client.infer("label", {"vector": vector})
            np.testing.assert_array_equal(answer["negative"], -vector)
            assert answer["label"].dtype == np.int64
            assert answer["label"].ravel().tolist() == vector.argmax(1).tolist()


def test_many_clients_get_their_own_answers(lab: Endpoint) -> None:
    def ask(number: int) -> float:
        with connect(lab.grpc) as client:
            return max(float(client.infer("gather", {"ids": np.array([[number]])})["rows"][0, 0, 0]) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [float(TABLE[number, 0]) for number in range(8)]


def test_bad_request_is_refused_and_the_next_is_answered(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        for inputs in ({"x": np.zeros((1, 5), np.float32)}, {"x": np.zeros((1, 4))}, {}):
            with pytest.raises(RequestRejected):
                client.infer("tiny", inputs)
        assert client.infer("tiny", {"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)


def test_a_model_with_float64_is_refused_when_it_loads(tmp_path: Path, openvino_server: Path) -> None:
    from onnx import TensorProto as T

    onnx = tmp_path / "model.onnx"
    save(onnx, [("Neg", ["a"], ["b"])], [("a", T.DOUBLE, ["batch", 1])], [("b", T.DOUBLE, ["batch", 1])])
    pair = [TensorSpec(name, "float64", (BATCH, 1)) for name in "ab"]
    publish(tmp_path / "repository", "double", onnx, pair[:1], pair[1:])
    with pytest.raises(ModelRefused, match="f64, which is not supported"), running(tmp_path / "repository"):
        pass


def test_a_server_without_openvino_says_how_to_get_it(
    server_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "repository", "tiny", save_tiny(tmp_path / "model.onnx"), TINY_INPUTS, TINY_OUTPUTS)
    place = tmp_path / "server"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(server_prefix / "bin" / "python")
    shutil.copytree(server_prefix / "backends", place / "backends")
    marker = json.loads((server_prefix / "modelathe-server.json").read_text())
    (place / "modelathe-server.json").write_text(json.dumps({**marker, "openvino": ""}))
    monkeypatch.setenv("MODELATHE_SERVER", str(place))
    with pytest.raises(NotInstalled) as raised, running(tmp_path / "repository"):
        pass
    assert raised.value.fix == "run: serve install --with openvino"
    install.environment(place).require("onnxruntime")


def test_an_environment_keeps_openvino(openvino_server: Path) -> None:
    assert install.environment(install.install(openvino_server)).openvino


def test_the_config_is_what_tritons_own_backend_reads() -> None:
    batched = model_config.build("tiny", TINY_INPUTS, TINY_OUTPUTS, OPENVINO, [1])
    assert (batched.backend, batched.default_model_filename) == ("openvino", "model.onnx")
    assert {key: entry.string_value for key, entry in batched.parameters.items()} == {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": "1",
        "ENABLE_BATCH_PADDING": "YES",
    }
    open_length = TensorSpec("x", "float32", (BATCH, LENGTH))
    varying = model_config.build("varying", [open_length], [open_length], OPENVINO, [1])
    assert "ENABLE_BATCH_PADDING" not in varying.parameters


@pytest.fixture(scope="module")
def backend() -> Iterator[SimpleNamespace]:
    with imported("openvino") as modules:
        yield modules


def test_parameters_become_openvinos_settings(backend: SimpleNamespace) -> None:
    def settings(**parameters: str) -> dict[str, str]:
        return backend.model.settings({"parameters": {key: {"string_value": text} for key, text in parameters.items()}})

    assert settings(NUM_STREAMS="auto", HINT_BF16="YES", ENABLE_BATCH_PADDING="YES", TARGET_DEVICE="CPU") == {
        "NUM_STREAMS": "AUTO",
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    for parameter in ({"TARGET_DEVICE": "GPU"}, {"CPU_EXTENSION_PATH": "/a.so"}, {"intra_op_thread_count": "1"}):
        with pytest.raises(ValueError, match=next(iter(parameter))):
            settings(**parameter)


def test_texts_and_refusals(backend: SimpleNamespace) -> None:
    error = RuntimeError(
        "Exception from src/core.cpp:132:\nCheck failed at src/a.cpp:3:\nCan not read /secret/model\n\n"
    )
    assert backend.model.public_text(error) == "Can not read"
    assert backend.instance.refusal(GOOD, "1.26.4") is None
