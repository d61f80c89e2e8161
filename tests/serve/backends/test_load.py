"""Load on models of many kinds behind a real server: sequences, mixes of models and of shapes, recorded traffic."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.cli import main
from loadtest.judge.summary import summarize
from loadtest.record.results import OK, read
from serve.server.endpoint import Endpoint
from tests.conftest import TINY, TINY_WEIGHT
from tests.serve.commands.test_up import serve

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """The command line takes over SIGTERM; the test runner gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def load(served: Endpoint, scheme: str, model: str, path: Path, *options: object) -> dict[str, Any]:
    fixed = ("--url", getattr(served, scheme), "--warmup", "0s", "--duration", "1s", "--output", path / "r.jsonl")
    done = CliRunner().invoke(main, ["run", model, *map(str, (*fixed, *options)), "--json"])
    assert (path / "r.jsonl").exists(), done.output
    return summarize(path / "r.jsonl")


def running_sums(path: Path) -> Path:
    """Sequences whose right answers are known only if their order is kept and no two get mixed up."""
    rng = np.random.default_rng(0)
    streams = [rng.integers(-9, 9, length).tolist() for length in (4, 3, 2, 7)]
    document = {
        "data": [[{"x": [value]} for value in stream] for stream in streams],
        "validation_data": [[{"y": [int(total)]} for total in np.cumsum(stream)] for stream in streams],
    }
    (path / "streams.json").write_text(json.dumps(document))
    return path / "streams.json"


@SCHEMES
@pytest.mark.parametrize("way", [("--concurrency", 4), ("--rate", 100), ("--concurrency", 2, "--warmup", "300ms")])
def test_sequences_keep_their_order_on_a_server_that_remembers(
    served: Endpoint, scheme: str, way: tuple[object, ...], tmp_path: Path
) -> None:
    document = load(served, scheme, "sums", tmp_path, "--data", running_sums(tmp_path), *way)
    requests = document["requests"]
    assert requests["done"] == requests["planned"] == document["checked"] > 20, document["errors"]
    assert requests["mismatched"] == 0
    assert document["server"]["reconciled"]


def test_a_sequence_that_is_told_wrongly_is_noticed(served: Endpoint, tmp_path: Path) -> None:
    # Longer than the streams: from the second round on the sums are no longer the stated ones.
    document = load(served, "grpc", "sums", tmp_path, "--data", running_sums(tmp_path), "--sequence", 9)
    assert document["requests"]["mismatched"] > 0
    assert {sample["output"] for sample in document["mismatches"]} == {"y"}


@SCHEMES
def test_sequences_of_generated_values(served: Endpoint, scheme: str, tmp_path: Path) -> None:
    document = load(served, scheme, "sums", tmp_path, "--sequence", 5, "--concurrency", 3)
    assert document["requests"]["failed"] == 0
    assert document["requests"]["done"] > 20


@SCHEMES
def test_a_mix_of_models_and_shapes(served: Endpoint, scheme: str, tmp_path: Path) -> None:
    document = load(
        served, scheme, "tokens_free", tmp_path, "--mix", f"{TINY}=2", "--tolerance", 1e-4,
        "--shape", "ids:64 mask:64=3", "--shape", "ids:16 mask:16=1", "--concurrency", 4,
    )  # fmt: skip
    assert [part["model"] for part in document["parts"]] == ["tokens_free", "tokens_free", TINY]
    assert [part["shapes"].get("ids") for part in document["parts"]] == [[1, 64], [1, 16], None]
    assert document["requests"]["mismatched"] == document["requests"]["failed"] == 0
    assert document["checked"] == document["requests"]["done"] > 50
    assert document["server"]["reconciled"]
    results = read(tmp_path / "r.jsonl")
    shares = np.bincount(results.payload // 16, minlength=3) / len(results.payload)
    for share, weight in zip(shares, (1 / 4, 1 / 12, 2 / 3), strict=True):
        assert share == pytest.approx(weight, abs=5 * np.sqrt(weight / len(results.payload)))


def recording(path: Path) -> Path:
    lines = []
    for n in range(12):
        if n % 3:
            x = np.full((1 + n % 2, 4), n / 10, np.float32)
            inputs = [{"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}]
            y = x @ TINY_WEIGHT
            outputs = [{"name": "y", "shape": list(y.shape), "datatype": "FP32", "data": y.tolist()}]
            lines.append({"at": n / 20, "model": TINY, "inputs": inputs, "outputs": outputs})
        else:
            strings = {"name": 'it\'s "a" $(x) `y`\\ {z}', "shape": [1, 2], "datatype": "BYTES", "data": ["a", "ü"]}
            lines.append({"at": n / 20, "model": "1-odd.strings", "inputs": [strings]})
    (path / "recorded.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path / "recorded.jsonl"


@SCHEMES
def test_recorded_traffic_of_two_models(served: Endpoint, scheme: str, tmp_path: Path) -> None:
    document = load(served, scheme, TINY, tmp_path, "--trace", recording(tmp_path), "--speed", 2)
    results = read(tmp_path / "r.jsonl")
    assert results.of(OK).sum() == 12, document["errors"]
    np.testing.assert_allclose(results.planned, np.arange(12) / 40, atol=1e-6)
    assert [part["model"] for part in document["parts"]] == ["1-odd.strings", TINY]
    assert results.payload.tolist() == [0, 4, 5, 1, 6, 7, 2, 8, 9, 3, 10, 11]
    assert document["checked"] == 8


def test_a_canary_replays_what_a_load_test_does(kinds: Path, server_prefix: Path, tmp_path: Path) -> None:
    done = serve(
        "canary", TINY, "1", "1", "--repository", str(kinds), "--max-slowdown", "100",
        "--requests", str(recording(tmp_path)), "--json",
    )  # fmt: skip
    # Eight requests decide nothing, but they are those of the recording.
    assert done.returncode == 3, done.stderr
    told = json.loads(done.stdout)
    assert "undecided" in told["error"]["what"]
    assert told["requests"] == 8
