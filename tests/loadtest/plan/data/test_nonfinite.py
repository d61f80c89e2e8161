"""Infinity in data as a right answer always; NaN, and both as inputs, where somebody says that a model takes them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto as T

from loadtest.cli import main
from loadtest.plan.data import read
from loadtest.plan.data.request import Signature
from modelathe.errors import BadInput
from modelathe.tensors import TensorSpec
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import publish, save

SPECS = [TensorSpec("x", "float32", (4,))], [TensorSpec("y", "float32", (4,))]
GIVEN = np.array([[0.25, np.nan, 0.75, -np.inf]], np.float32)
RIGHT = np.array([[0.25, -np.inf, -np.inf, -np.inf]], np.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    """A model that masks what is not below a half, NaN too."""
    here = tmp_path_factory.mktemp("nonfinite")
    path = save(
        *(here / "m.onnx", [("Less", ["x", "half"], ["below"]), ("Where", ["below", "x", "masked"], ["y"])]),
        *([("x", T.FLOAT, [4])], [("y", T.FLOAT, [4])]),
        [("half", np.float32(0.5)), ("masked", np.float32(-np.inf))],
    )
    publish(here / "repository", "masks", path, *SPECS)
    with running(here / "repository", grace=0) as endpoint:
        yield endpoint


def npz(at: Path) -> Path:
    np.savez(at / "d.npz", x=GIVEN, y=RIGHT)
    return at / "d.npz"


def recorded(at: Path) -> Path:
    tensor = {"shape": [4], "datatype": "FP32"}
    line = {
        "inputs": [{"name": "x", "data": GIVEN[0].tolist(), **tensor}],
        "outputs": [{"name": "y", "data": RIGHT[0].tolist(), **tensor}],
    }
    (at / "d.jsonl").write_text(json.dumps(line) + "\n")
    return at / "d.jsonl"


def entries(at: Path) -> Path:
    document = {"data": [{"x": GIVEN[0].tolist()}], "validation_data": [{"y": RIGHT[0].tolist()}]}
    (at / "d.json").write_text(json.dumps(document))
    return at / "d.json"


def raw(at: Path) -> Path:
    (at / "d").mkdir()
    np.save(at / "d" / "x.npy", GIVEN[0])
    (at / "d" / "y").write_bytes(RIGHT[0].tobytes())
    return at / "d"


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("write", [npz, recorded, entries, raw])
def test_the_way_out_that_is_named_works(
    served: Endpoint, write: Callable[[Path], Path], scheme: str, tmp_path: Path
) -> None:
    data = write(tmp_path)
    command = ["run", "masks", "--url", getattr(served, scheme), "--data", str(data), "--requests", "8", "--json"]
    more = ["--warmup", "0s", "--allow-invalid", "--output", str(tmp_path / "r.jsonl")]
    refused = CliRunner().invoke(main, [*command, *more])
    assert refused.exit_code == 4, refused.output
    said = json.loads(refused.stdout)["error"]
    assert said["what"].startswith("x has a value that is NaN or infinite")
    option = said["fix"].rpartition(" ")[2]
    done = CliRunner().invoke(main, [*command, *more, option])
    assert (done.exit_code, json.loads(done.stdout).get("checked")) == (0, 8), done.output


@pytest.mark.parametrize("write", [npz, recorded, entries, raw])
def test_what_is_right_may_be_infinite(write: Callable[[Path], Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "GIVEN", np.zeros((1, 4), np.float32))
    (right,) = read.read(write(tmp_path), Signature(*SPECS)).expected
    np.testing.assert_array_equal(right["y"], RIGHT[0])


@pytest.mark.parametrize("write", [npz, recorded, entries, raw])
def test_nan_is_no_right_answer(write: Callable[[Path], Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(globals(), "GIVEN", np.zeros((1, 4), np.float32))
    monkeypatch.setitem(globals(), "RIGHT", np.array([[0, np.nan, 0, 0]], np.float32))
    path = write(tmp_path)
    with pytest.raises(BadInput, match="the right y is NaN"):
        read.read(path, Signature(*SPECS))
    (right,) = read.read(path, Signature(*SPECS, nonfinite=True)).expected
    np.testing.assert_array_equal(right["y"], RIGHT[0])


def test_a_number_beyond_a_types_range_is_another_matter(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"data": [{"x": [1e300, 0, 0, 0]}]}')
    with pytest.raises(BadInput, match="beyond the range of float32"):
        read.read(tmp_path / "d.json", Signature(*SPECS, nonfinite=True))


def test_a_size_of_0_can_be_said(served: Endpoint, tmp_path: Path) -> None:
    from loadtest.plan.options import Shape

    assert Shape().convert("x:0,4 y:2=3", None, None) == ({"x": (0, 4), "y": (2,)}, 3.0)
    command = ["run", "masks", "--url", served.grpc, "--shape", "x:0", "--requests", "1"]
    done = CliRunner().invoke(main, [*command, "--output", str(tmp_path / "r.jsonl")])
    assert (done.exit_code, "--shape x:0 does not fit x: float32 [4]" in done.output) == (2, True), done.output
