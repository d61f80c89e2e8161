"""Which models the response cache may answer for, and that it does not answer where we ask for a process."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import Client, connect
from modelathe.errors import BadInput
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import cache, model_config, settings
from serve.config.target import Target
from serve.repository import lint
from serve.repository import tree as repository
from serve.rollout import canary
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from serve.watch import probe
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, save_tiny
from tests.serve.backends.test_backend import save
from tests.serve.kinds import publish
from tests.serve.server.test_server import eventually

SIZE = Dim("size", 1, 4, 64)
FIXED, FREE = TensorSpec("x", "float32", (BATCH, 4)), TensorSpec("x", "float32", (BATCH, SIZE))
ALONE = TensorSpec("x", "float32", (SIZE,))
Y, Z = TensorSpec("y", "float32", (BATCH, 1)), TensorSpec("z", "float32", (BATCH, 1))


def build(inputs: TensorSpec, *outputs: TensorSpec, **asked: Any) -> Any:
    made = settings.read({"cache": True, **asked}, "m")
    return model_config.build("m", [inputs], outputs, Target(cores=1), [1], made)


@pytest.mark.parametrize(
    ("inputs", "outputs", "asked", "says"),
    [
        (FREE, [Y], {}, "requests of other shapes may have the same bytes in x"),
        (FIXED, [Y, Z], {}, "answer a request for one output with another"),
        (FIXED, [Y], {"sequence": {}}, "a model that remembers"),
        (TensorSpec("x", "float32", (SIZE, SIZE)), [TensorSpec("y", "float32", (1,))], {}, "the same bytes in x"),
    ],
)
def test_what_the_cache_would_confuse_is_refused(
    inputs: TensorSpec, outputs: list[TensorSpec], asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        build(inputs, *outputs, **asked)
    assert "leave the cache out" in refused.value.fix
    assert cache.refusal(build(inputs, *outputs, cache=False, **asked)) is None


@pytest.mark.parametrize(
    ("inputs", "output", "asked"),
    [(FIXED, Y, {}), (FREE, Y, {"max_batch": 1}), (ALONE, TensorSpec("y", "float32", (1,)), {})],
)
def test_what_it_cannot_confuse_is_not(inputs: TensorSpec, output: TensorSpec, asked: dict[str, Any]) -> None:
    assert build(inputs, output, **asked).response_cache.enable


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with a cache: `confused` as its configuration was written by hand, `single` as the way out has it."""
    from onnx import TensorProto as T

    here = tmp_path_factory.mktemp("cached")
    place, onnx = here / "repository", here / "model.onnx"
    nodes = [("ReduceSum", ["x", "axes"], ["y"], {"keepdims": 1}), ("Neg", ["y"], ["z"])]
    tensors = [("x", T.FLOAT, ["batch", "size"])], [("y", T.FLOAT, ["batch", 1]), ("z", T.FLOAT, ["batch", 1])]
    save(onnx, nodes, *tensors, [("axes", np.array([1]))])
    publish(place, "confused", onnx, [FREE], [Y, Z])
    (place / "confused" / "1" / repository.LINEAGE).unlink()
    written = (place / "confused" / repository.CONFIG).read_text()
    (place / "confused" / repository.CONFIG).write_text(f"{written}\nresponse_cache {{ enable: true }}\n")
    publish(place, "single", onnx, [FREE], [Y], {"cache": True, "max_batch": 1})
    publish(place, TINY, save_tiny(onnx), TINY_INPUTS, TINY_OUTPUTS, {"cache": True})
    ids = TensorSpec("ids", "int64", (BATCH, 2), values=(0, 3))
    save(onnx, [("Neg", ["ids"], ["same"])], [("ids", T.INT64, ["batch", 2])], [("same", T.INT64, ["batch", 2])])
    publish(place, "few", onnx, [ids], [TensorSpec("same", "int64", (BATCH, 2))], {"cache": True})
    return place


@pytest.fixture(scope="module")
def served(place: Path, server_prefix: Path) -> Iterator[Endpoint]:
    with running(place, grace=0) as endpoint:
        yield endpoint


def test_check_finds_by_hand_what_add_refuses(place: Path) -> None:
    found = [finding.what for finding in lint.check(place) if "cache" in finding.what]
    assert found == ["cache: requests of other shapes may have the same bytes in x"]


def test_triton_confuses_them_indeed(served: Endpoint) -> None:
    x = np.arange(8, dtype=np.float32)
    with connect(served.grpc) as client:
        assert client.infer("confused", {"x": x.reshape(1, 8)})["y"].tolist() == [[28]]
        if client.infer("confused", {"x": x.reshape(2, 4)})["y"].tolist() == [[6], [22]]:
            pytest.fail("this server's cache looks at shapes: allow it")
        # The way out.
        assert client.infer("single", {"x": x.reshape(1, 8)})["y"].tolist() == [[28]]
        assert client.infer("single", {"x": x[:4].reshape(1, 4)})["y"].tolist() == [[6]]


@pytest.mark.parametrize("model", [TINY, "few"])
def test_no_two_questions_of_the_probe_are_alike(served: Endpoint, place: Path, model: str) -> None:
    """Two ids of four values would soon repeat, so they come in larger batches."""
    rng = np.random.default_rng(0)
    with Client(served.grpc, timeout=10) as client:
        before = counts.counted(client, model)
        asked = probe.question(place, model, client)
        for _ in range(50):
            assert probe.ask(client, served, model, asked, rng) == ("answers", "")
        assert eventually(lambda: (counts.counted(client, model) - before).execution_count == 50)


def test_a_server_for_a_proof_answers_from_the_models(place: Path, server_prefix: Path) -> None:
    same = {"x": np.ones((1, 4), np.float32)}
    with running(place, models=[TINY], cache=False, grace=0) as endpoint, Client(endpoint.grpc, timeout=10) as client:
        before = counts.counted(client, TINY)
        for _ in range(5):
            client.infer(TINY, same)
        assert eventually(lambda: (counts.counted(client, TINY) - before).execution_count == 5)


def test_status_asks_the_processes(served: Endpoint, place: Path) -> None:
    with Client(served.grpc, timeout=10) as client:
        before = counts.counted(client, TINY)
        for _ in range(5):
            assert probe.health(served, place)[TINY] == "answers"
        assert eventually(lambda: (counts.counted(client, TINY) - before).execution_count == 5)


def test_a_canary_compares_processes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "repository"
    shutil.copytree(place, copy)
    publish(copy, TINY, save_tiny(tmp_path / "tiny.onnx"), TINY_INPUTS, TINY_OUTPUTS, {"cache": True})
    counted = []
    real = canary._ask

    def ask(client: Client, side: str, *more: Any) -> Any:
        answer = real(client, side, *more)
        counted.append((side, counts.counted(client, side).execution_count))
        return answer

    monkeypatch.setattr(canary, "_ask", ask)
    same = {"x": np.ones((1, 4), np.float32)}
    canary.compare(copy, TINY, 1, 2, [same] * 10)
    for side in canary.SIDES:
        seen = [count for name, count in counted if name == side]
        assert seen[-1] - seen[0] >= len(seen) - 2  # the server counts a moment after it has answered
