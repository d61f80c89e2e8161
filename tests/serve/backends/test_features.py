"""What the backend's own list calls tested, each on a real server whose models each stress one thing."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import RequestRejected
from modelathe.tensors import BATCH, TensorSpec
from serve.config import settings
from serve.config.target import Target
from serve.repository import source, staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.server import dryload
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.watch import probe
from tests.conftest import TINY_WEIGHT, save_tiny
from tests.serve.backends.test_backend import imported, save

X, Y = TensorSpec("x", "float32", (BATCH, 1)), TensorSpec("y", "float32", (BATCH, 1))


def publish(place: Path, model: str, onnx: Path, inputs, outputs, asked=None, more: str = "") -> None:
    """Publish with settings, and with further text of a configuration."""
    made = settings.read(asked or {}, model)
    with staging.stage(place, model, Source(onnx, inputs, outputs), Target(cores=1), made) as staged:
        if more:
            path = staged.path / model / "config.pbtxt"
            path.write_text(f"{path.read_text()}\n{more}\n")
        staging.publish(staged, {})


TUNED = {
    "inter_op_thread_count": "2",
    "execution_mode": "1",
    "enable_mem_pattern": "0",
    "memory.enable_memory_arena_shrinkage": "cpu:0",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("lab")
    place, onnx = here / "repository", here / "model.onnx"
    x, y = ("x", T.FLOAT, ["batch", 1]), ("y", T.FLOAT, ["batch", 1])
    state = [TensorSpec("sum", "float32", (BATCH, 1)), TensorSpec("total", "float32", (BATCH, 1))]
    save(
        onnx,
        [("Add", ["x", "sum"], ["total"]), ("Identity", ["total"], ["y"])],
        [x, ("sum", T.FLOAT, ["batch", 1])],
        [y, ("total", T.FLOAT, ["batch", 1])],
    )
    for strategy in ("oldest", "direct"):
        memory = {"state": {"sum": "total"}, "idle_s": 2, "strategy": strategy}
        publish(place, f"sums_{strategy}", onnx, [X, state[0]], [Y, state[1]], {"sequence": memory})
    first = TensorSpec("first", "float32", (BATCH, 1))
    save(onnx, [("Add", ["x", "first"], ["y"])], [x, ("first", T.FLOAT, ["batch", 1])], [y])
    publish(place, "flags", onnx, [X, first], [Y], {"sequence": {"start": "first"}})
    bias = np.full((1, 1), 5, np.float32)
    save(onnx, [("Add", ["x", "bias"], ["y"])], [x, ("bias", T.FLOAT, ["rows", 1])], [y], [("bias", bias)])
    optional = 'input { name: "bias" data_type: TYPE_FP32 dims: [1] optional: true }'
    publish(place, "optional", onnx, [X], [Y], {"queue_delay_us": 200_000}, optional)
    save(onnx, [("Neg", ["x"], ["y"])], [x], [y])
    for model, asked in {
        "finite": {"nonfinite": "refuse"},
        "cached": {"cache": True},
        "levels": {"priorities": 3, "timeout_ms": 60_000},
        "copies": {"instances": 2, "resources": {"memory": 1}},
    }.items():
        publish(place, model, onnx, [X], [Y], asked)
    entries = (f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in TUNED.items())
    publish(
        place, "tuned", onnx, [X], [Y], {"threads": 3}, "\n".join([*entries, "optimization { graph { level: 2 } }"])
    )
    publish(place, "lean", onnx, [X], [Y], {}, 'parameters { key: "enable_mem_arena" value { string_value: "0" } }')
    with running(place, grace=0) as endpoint:
        yield endpoint


def row(*values: float) -> dict[str, np.ndarray]:
    return {"x": np.array(values, np.float32).reshape(-1, 1)}


class Session:
    """One sequence of requests."""

    def __init__(self, endpoint: Endpoint, model: str, number: int) -> None:
        import tritonclient.grpc as library

        self._library, self._model, self._number = library, model, number
        self._client = library.InferenceServerClient(endpoint.grpc.removeprefix("grpc://"))

    def send(self, value: float, **flags: bool) -> float:
        tensor = self._library.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.full((1, 1), value, np.float32))
        result = self._client.infer(self._model, [tensor], sequence_id=self._number, **flags)
        return float(result.as_numpy("y")[0, 0])

    def close(self) -> None:
        self._client.close()


@pytest.mark.parametrize("strategy", ["oldest", "direct"])
def test_each_sequence_has_a_state_of_its_own(lab: Endpoint, strategy: str) -> None:
    sessions = [Session(lab, f"sums_{strategy}", number) for number in (7, 8, 9)]
    try:
        for step, value in enumerate((1, 2, 3, 4)):
            seen = [session.send(value * (n + 1), sequence_start=step == 0) for n, session in enumerate(sessions)]
            assert seen == [sum(range(value + 1)) * (n + 1) for n in range(3)]
        assert sessions[0].send(5, sequence_end=True) == 15
        # The same id begins anew.
        assert sessions[0].send(1, sequence_start=True, sequence_end=True) == 1
        assert sessions[1].send(0, sequence_end=True) == 20
        assert sessions[2].send(0, sequence_end=True) == 30
    finally:
        for session in sessions:
            session.close()


def test_sequences_of_many_clients_at_once(lab: Endpoint) -> None:
    wrong: list[str] = []

    def run(number: int) -> None:
        session, total = Session(lab, "sums_oldest", 100 + number), 0.0
        for step in range(20):
            total += number
            seen = session.send(number, sequence_start=step == 0, sequence_end=step == 19)
            if seen != total:
                wrong.append(f"sequence {number}, step {step}: {seen} instead of {total}")
        session.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong


def test_what_the_server_keeps_is_no_clients_affair(lab: Endpoint) -> None:
    place = lab_repository(lab)
    for model in ("sums_oldest", "flags"):
        lineage = repository.read_lineage(place, model)
        assert [spec["name"] for spec in lineage["inputs"]] == ["x"]
        assert [spec["name"] for spec in lineage["outputs"]] == ["y"]
        assert lineage["kept"]["inputs"]
    assert set(probe.health(lab, place).values()) == {"answers"}
    found = source.load(place / "sums_oldest" / "1", {})
    assert [spec.name for spec in found.inputs] == ["x", "sum"]
    with staging.stage(
        place.parent / "again",
        "sums",
        found,
        Target(cores=1),
        settings.read(found.settings, ""),
    ) as staged:
        dryload.staged(staged)


def lab_repository(endpoint: Endpoint) -> Path:
    """The repository that a server of ours was started over."""
    command = Path(f"/proc/{endpoint.pid}/cmdline").read_bytes().split(b"\0")
    return Path(next(word for word in command if word.startswith(b"--model-repository=")).decode().partition("=")[2])


def test_a_control_input_says_what_is_first(lab: Endpoint) -> None:
    session = Session(lab, "flags", 3)
    assert session.send(10, sequence_start=True) == 11
    assert session.send(10) == 10
    assert session.send(10, sequence_end=True) == 10
    session.close()


def test_an_optional_input_has_its_default_in_the_graph(lab: Endpoint) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(request: dict[str, np.ndarray]) -> list[float]:
        with connect(lab.grpc) as client:
            return client.infer("optional", request)["y"].ravel().tolist()

    given = {"bias": np.full((1, 1), 100, np.float32)}
    # Sent at once, they wait for each other and would share a batch.
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [row(1), {**row(2), **given}, row(3), {**row(4), **given}]))
    assert answers == [[6], [102], [8], [104]]


def test_values_that_are_not_finite_are_refused_where_asked(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(RequestRejected, match="the input x holds NaN or infinity"):
                client.infer("finite", row(1, value))
            assert not np.isfinite(client.infer("tuned", row(value))["y"]).any()
        assert client.infer("finite", row(1, 2))["y"].ravel().tolist() == [-1, -2]


def test_the_cache_answers_what_was_answered(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        before = counts.counted(client, "cached")
        for _ in range(3):
            assert client.infer("cached", row(0.25))["y"].tolist() == [[-0.25]]
        counted = counts.counted(client, "cached") - before
    assert (counted.success, counted.execution_count) == (3, 1)


def test_copies_priorities_and_tuned_sessions_answer(lab: Endpoint) -> None:
    with connect(lab.grpc) as client:
        for model in ("copies", "levels", "tuned", "lean"):
            for size in (1, 5, 32):
                values = np.linspace(-1, 1, size, dtype=np.float32)
                np.testing.assert_array_equal(client.infer(model, row(*values))["y"].ravel(), -values)
    assert len(processes(lab, "copies")) == 2


def processes(endpoint: Endpoint, model: str) -> list[Path]:
    """The backend processes of a model."""
    children = [
        Path(f"/proc/{pid}") for pid in Path(f"/proc/{endpoint.pid}/task/{endpoint.pid}/children").read_text().split()
    ]
    commands = {child: (child / "cmdline").read_bytes().split(b"\0") for child in children}
    return [
        child
        for child, command in commands.items()
        if command[0].endswith(b"stub") and f"/{model}/".encode() in command[1]
    ]


def test_threads_are_each_models_own(lab: Endpoint) -> None:
    """`tuned` asked for three threads within an operator and two across; `finite` for one."""
    threads = {model: len(list((processes(lab, model)[0] / "task").iterdir())) for model in ("tuned", "finite")}
    assert threads["tuned"] == threads["finite"] + 2 + 1


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A repository without any configuration."""
    place = tmp_path / "bare"
    (place / "tiny" / "1").mkdir(parents=True)
    save_tiny(place / "tiny" / "1" / "model.onnx")
    return place


def test_a_model_without_a_configuration_is_completed(bare: Path, server_prefix: Path) -> None:
    with running(bare, grace=0) as endpoint, connect(endpoint.grpc) as client:
        inputs, outputs = client.metadata("tiny")
        assert [spec.name for spec in (*inputs, *outputs)] == ["x", "y"]
        assert inputs[0].dims[0].maximum == 4  # type: ignore[union-attr]
        x = np.ones((3, 4), np.float32)
        np.testing.assert_allclose(client.infer("tiny", {"x": x})["y"], x @ TINY_WEIGHT)
        with pytest.raises(RequestRejected, match="batch"):
            client.infer("tiny", {"x": np.ones((5, 4), np.float32)})


@pytest.mark.parametrize(("stated", "limit"), [("max_batch_size: 9", 9), ("", 4)])
def test_what_a_configuration_states_stays(bare: Path, server_prefix: Path, stated: str, limit: int) -> None:
    (bare / "tiny" / "config.pbtxt").write_text(f'name: "tiny"\nbackend: "onnxruntime"\n{stated}\n')
    with running(bare, grace=0) as endpoint:
        connection = http.client.HTTPConnection(urlsplit(endpoint.http).netloc)
        connection.request("GET", "/v2/models/tiny/config")
        config = json.load(connection.getresponse())
        connection.close()
    assert config["max_batch_size"] == limit
    assert "dynamic_batching" in config


def test_a_fixed_batch_axis_is_not_batched(bare: Path, server_prefix: Path) -> None:
    import onnx

    path = bare / "tiny" / "1" / "model.onnx"
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    with running(bare, grace=0) as endpoint, connect(endpoint.grpc) as client:
        assert client.infer("tiny", {"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 3)


def test_providers_and_their_options() -> None:
    gpu = {
        "optimization": {
            "execution_accelerators": {
                "gpu_execution_accelerator": [
                    {
                        "name": "tensorrt",
                        "parameters": {
                            "precision_mode": "FP16",
                            "max_workspace_size_bytes": "1024",
                            "trt_engine_cache_enable": "1",
                        },
                    },
                    {"name": "cuda", "parameters": {"use_ep_level_unified_stream": "1"}},
                ]
            }
        },
        "parameters": {"cudnn_conv_algo_search": {"string_value": "1"}, "gpu_mem_limit": {"string_value": "77"}},
    }
    with imported("onnxruntime") as backend:
        assert backend.model.providers(gpu, "CPU", 0) == ["CPUExecutionProvider"]
        assert backend.model.providers(gpu, "GPU", 1) == [
            (
                "TensorrtExecutionProvider",
                {
                    "trt_max_workspace_size": "1024",
                    "trt_engine_cache_enable": "1",
                    "trt_fp16_enable": "1",
                    "device_id": 1,
                },
            ),
            (
                "CUDAExecutionProvider",
                {
                    "cudnn_conv_algo_search": "HEURISTIC",
                    "gpu_mem_limit": "77",
                    "use_ep_level_unified_stream": "1",
                    "device_id": 1,
                },
            ),
            "CPUExecutionProvider",
        ]
        wrong = {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "openvino"}]}}}
        with pytest.raises(ValueError, match="the accelerator openvino is not known"):
            backend.model.providers(wrong, "GPU", 0)
