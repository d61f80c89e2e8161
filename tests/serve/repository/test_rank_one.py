"""Samples that are single numbers: requests carry them as [n, 1], models and users have [n], and all of us know it."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from loadtest.cli import main as loadtest
from loadtest.plan.data import payload
from modelathe.client import Client, connect
from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.predict.endpoint import from_served, to_served
from serve.cli import main
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

IDS = np.arange(1, 9, dtype=np.int64)
AUDIO = np.arange(40, dtype=np.float32).reshape(8, 5)
TEXT = np.array([b"a", b"", "ö".encode(), b"dd", b"e", b"f", b"g", b"h"], object)
GRAPHS = {
    "ids": (
        [("Mul", ["ids", "two"], ["y"])],
        [("ids", T.INT64, ["N"])],
        [("y", T.INT64, ["N"])],
        [("two", np.int64(2))],
    ),
    "speech": (
        [
            ("ReduceSum", ["audio", "one"], ["sum"], {"keepdims": 0}),
            ("Cast", ["lengths"], ["f"], {"to": T.FLOAT}),
            ("Mul", ["sum", "f"], ["mass"]),
            ("Identity", ["audio"], ["same"]),
        ],
        [("audio", T.FLOAT, ["N", "T"]), ("lengths", T.INT64, ["N"])],
        [("mass", T.FLOAT, ["N"]), ("same", T.FLOAT, ["N", "T"])],
        [("one", np.array([1], np.int64))],
    ),
    "words": ([("Identity", ["word"], ["same"])], [("word", T.STRING, ["N"])], [("same", T.STRING, ["N"])], []),
}
SENT = {"ids": {"ids": IDS}, "speech": {"audio": AUDIO, "lengths": IDS}, "words": {"word": TEXT}}
RIGHT = {"ids": {"y": 2 * IDS}, "speech": {"mass": AUDIO.sum(1) * IDS.astype(np.float32)}, "words": {"same": TEXT}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Path:
    here = tmp_path_factory.mktemp("rank_one")
    for model, graph in GRAPHS.items():
        onnx = save(here / "model.onnx", *graph)
        more = ["--dim", "T=1,5,9"] if model == "speech" else []
        for _ in range(1 + (model == "ids")):
            command = ["add", str(onnx), "--name", model, "--repository", str(here / "repository"), *more]
            done = CliRunner().invoke(main, command)
            assert done.exit_code == 0, done.output
    return here / "repository"


@pytest.fixture(scope="module")
def served(place: Path) -> Endpoint:
    with running(place, grace=0) as endpoint:
        yield endpoint


def own(client: Client, model: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    return client.metadata(model, own=True)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("model", GRAPHS)
def test_what_a_model_has_is_found_out_and_brought_back(served: Endpoint, model: str, scheme: str) -> None:
    with connect(getattr(served, scheme)) as client:
        inputs, outputs = own(client, model)
        assert {spec.name: len(spec.dims) for spec in inputs} == {name: a.ndim for name, a in SENT[model].items()}
        answer = from_served(outputs, client.infer(model, to_served(inputs, SENT[model])))
    for name, right in RIGHT[model].items():
        assert answer[name].shape == right.shape
        np.testing.assert_array_equal(answer[name], right)


@pytest.mark.parametrize("model", GRAPHS)
@pytest.mark.parametrize("columns", [False, True])
def test_a_load_sends_what_the_user_has(
    served: Endpoint, place: Path, model: str, columns: bool, tmp_path: Path
) -> None:
    arrays = {**SENT[model], **RIGHT[model]}
    if columns:
        arrays = {name: array[:, None] if array.ndim == 1 else array for name, array in arrays.items()}
    arrays = {name: np.char.decode(a.astype(bytes)) if a.dtype == object else a for name, a in arrays.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    given = ["--data", str(tmp_path / "data.npz"), "--batch", "2", "--requests", "12"]
    command = ["run", model, "--url", served.grpc, "--repository", str(place), *given, "--json"]
    more = ["--warmup", "0s", "--allow-invalid", "--tolerance", "1e-5", "--output", str(tmp_path / "r.jsonl")]
    done = CliRunner().invoke(loadtest, [*command, *more])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["checked"], document["requests"]["failed"]) == (12, 0)


def test_a_lineage_states_what_is_sent(place: Path) -> None:
    specs, _ = payload.from_lineage(place, "ids", "1")
    assert [array["ids"].shape for array in payload.generate(specs, 2, 0, 3)] == [(3, 1)] * 2


def test_a_canary_sends_it_too(place: Path) -> None:
    options = ["--repository", str(place), "--max-slowdown", "100"]
    done = CliRunner().invoke(main, ["canary", "ids", "1", "2", *options])
    assert done.exit_code == 0, done.output


def test_specs_as_requests_carry_them() -> None:
    number, row = TensorSpec("a", "int64", (BATCH,)), TensorSpec("b", "int64", (BATCH, 2))
    assert (number.served.dims, row.served.dims) == ((BATCH, 1), (BATCH, 2))
    assert TensorSpec("c", "float32", ()).served.dims == (1,)
    length = TensorSpec("d", "float32", (Dim("length", 1, 2, 3),))
    assert length.served == length
    array = np.arange(3)
    sent = to_served([number], {"a": array, "b": array})
    assert (sent["a"].shape, sent["b"].shape) == ((3, 1), (3,))
    np.testing.assert_array_equal(from_served([number], sent)["a"], array)
    # Another form is an answer of its own, and is left for others to refuse.
    assert from_served([number], {"a": np.zeros((3, 2))})["a"].shape == (3, 2)
