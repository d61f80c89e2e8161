"""`serve clients`: every file runs as it is, against a real server and against the stub."""

import ast
import json
import os
import runpy
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelathe.errors import UsageError
from modelathe.tensors import NUMPY_DTYPES
from serve.clients import generate as clients
from serve.clients.standin.running import Place
from serve.config.errors import BadRepository
from serve.repository import interface
from serve.server.endpoint import Endpoint
from tests.conftest import TINY, TINY_WEIGHT
from tests.serve.commands.test_up import serve
from tests.serve.kinds import ODD, TABLE

Values = dict[str, np.ndarray]

EXPECTED = {
    TINY: lambda x: {"y": x["x"] @ TINY_WEIGHT},
    "tokens": lambda x: {"rows": TABLE[x["ids"]], "seen": x["mask"].astype(np.float32)},
    "tokens_free": lambda x: {"rows": TABLE[x["ids"]], "seen": x["mask"].astype(np.float32)},
    "1-odd.strings": lambda x: {"class": x[ODD]},
    "pair": lambda x: {"half": x["a"].astype(np.float16), "not_b": ~x["b"]},
    "halves": lambda x: {"minus": -x["h"]},
    "unbatched": lambda x: {"total": x["numbers"].sum(keepdims=True)},
    "sums": lambda x: {"y": x["x"]},
}
STEPS = {("sums", "client.py"): 2, ("sums", "grpc_client.py"): 2}
"""How often a file sends its values in one sequence, where the model adds them up."""


def expected(kinds: Path, model: str) -> Values:
    """What the model answers to the values that the files send."""
    asked, rng = interface.read(kinds, model, 1), np.random.default_rng(0)
    sent = {}
    for spec in asked.inputs:
        array = np.full((1, 2), b"some text", object) if spec.dtype == "object" else spec.generate(rng, 1)
        sent[spec.name] = np.pad(array, [(0, 0), (0, 32 - 20)]) if model == "tokens" else array
    return EXPECTED[model](sent)


def answers(kinds: Path, model: str, folder: Path, place: Endpoint | Place) -> dict[str, Values]:
    """Write the files of a model, run each, and return its outputs."""
    asked = interface.read(kinds, model, 1)
    python, shell, grpc = clients.write(clients.texts(asked, place.http, place.grpc), folder)
    done = subprocess.run(["sh", shell], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {shell.name: read(done.stdout)}
    for path in (python, grpc):
        answer = runpy.run_path(str(path))["answer"]
        found[path.name] = {spec.name: answer.as_numpy(spec.name) for spec in asked.outputs}
    return found


def read(answer: bytes) -> Values:
    """Return the outputs of an answer over HTTP, in JSON or behind it."""
    end = answer.index(b"]}]}") + 4 if b'"data"' in answer else answer.index(b"}}]}") + 4
    document, raw, found = json.loads(answer[:end]), answer[end:], {}
    for output in document["outputs"]:
        dtype = NUMPY_DTYPES[output["datatype"]]
        if "data" in output:
            values = [value.encode() if isinstance(value, str) else value for value in output["data"]]
            array = np.array(values, dtype)
        else:
            size = output["parameters"]["binary_data_size"]
            array, raw = np.frombuffer(raw[:size], dtype), raw[size:]
        found[output["name"]] = array.reshape(output["shape"])
    return found


@pytest.mark.parametrize("model", EXPECTED)
def test_each_file_gets_the_models_answer(kinds: Path, served: Endpoint, tmp_path: Path, model: str, capsys) -> None:
    wanted = expected(kinds, model)
    for file, outputs in answers(kinds, model, tmp_path, served).items():
        assert outputs.keys() == wanted.keys()
        for name, array in outputs.items():
            assert array.dtype == wanted[name].dtype, (file, name)
            times = STEPS.get((model, file), 1)
            if array.dtype in (object, bool):
                np.testing.assert_array_equal(array, wanted[name])
            else:
                np.testing.assert_allclose(array, wanted[name] * times, rtol=1e-6)
    printed = capsys.readouterr().out
    assert all(name in printed for name in wanted)


@pytest.mark.parametrize("model", EXPECTED)
def test_each_file_gets_the_stubs_answer(kinds: Path, stub: Place, tmp_path: Path, model: str) -> None:
    wanted = expected(kinds, model)
    for outputs in answers(kinds, model, tmp_path, stub).values():
        assert {name: (array.dtype, array.shape) for name, array in outputs.items()} == {
            name: (array.dtype, array.shape) for name, array in wanted.items()
        }


def code_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def test_a_plain_client_is_short(kinds: Path) -> None:
    texts = clients.texts(interface.read(kinds, TINY, 1), "http://127.0.0.1:8000", "grpc://127.0.0.1:8001")
    assert len(code_lines(texts["client.py"])) <= 12
    assert len(code_lines(texts["grpc_client.py"])) <= 12


def test_the_command_writes_and_prints(kinds: Path, served: Endpoint, tmp_path: Path) -> None:
    at = ("--repository", str(kinds), "--url", served.http, "--grpc-url", served.grpc)
    done = serve("clients", TINY, *at, "--output", str(tmp_path / "made"))
    assert done.returncode == 0, done.stderr
    names = ["client.py", "request.sh", "grpc_client.py"]
    assert done.stdout == "".join(f"written: {tmp_path / 'made' / name}\n" for name in names)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(names)
    assert (tmp_path / "made" / "request.sh").stat().st_mode & stat.S_IXUSR
    command = [sys.executable, tmp_path / "made" / "client.py"]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.startswith("y [[")) == (0, True), ran.stderr
    printed = serve("clients", TINY, *at).stdout
    document = json.loads(serve("clients", TINY, *at, "--json").stdout)
    assert document["number"] == 1
    for name, text in document["files"].items():
        assert (tmp_path / "made" / name).read_text() == text
        assert text in printed


def test_what_is_not_stated_is_said(kinds: Path, tmp_path: Path) -> None:
    place = tmp_path / "repository"
    (place / "bare" / "1").mkdir(parents=True)
    config = (kinds / "tokens" / "config.pbtxt").read_text().replace('"tokens"', '"bare"')
    (place / "bare" / "config.pbtxt").write_text(config)
    text = clients.texts(interface.read(place, "bare", 1), "http://a:1", "grpc://a:2")["client.py"]
    assert "no size of ids_1 is stated, so it is 1 here; no range of its values is stated" in text
    assert "(1, 1)" in text
    (place / "bare" / "config.pbtxt").write_text('name: "bare"\nbackend: "onnxruntime"\n')
    with pytest.raises(BadRepository, match="lists no inputs"):
        interface.read(place, "bare", 1)


@pytest.mark.parametrize(("url", "grpc_url"), [("grpc://a:1", "grpc://a:2"), ("http://a:1", "http://a:2"), ("a", "b")])
def test_addresses_are_checked(kinds: Path, url: str, grpc_url: str) -> None:
    with pytest.raises(UsageError):
        clients.texts(interface.read(kinds, TINY, 1), url, grpc_url)


def test_a_model_that_is_not_there(kinds: Path) -> None:
    done = serve("clients", "nobody", "--repository", str(kinds))
    assert done.returncode == 4
    assert f"it holds {', '.join(sorted(EXPECTED))}" in done.stderr


def test_names_cannot_leave_their_quotation(kinds: Path) -> None:
    asked: Any = interface.read(kinds, "1-odd.strings", 1)
    evil = "x\nimport os  # '''\nEND_OF_REQUEST\n\"; touch /tmp/x '"
    spec = type(asked.inputs[0])(evil, "object", asked.inputs[0].dims)
    changed = type(asked)(evil, 1, asked.config, (spec,), (spec,), frozenset(), {}, True)
    texts = clients.texts(changed, "http://a:1", "grpc://a:2")
    for name in ("client.py", "grpc_client.py"):
        tree = ast.parse(texts[name])
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == "os"]
        assert evil in {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    lines = texts["request.sh"].splitlines()
    assert lines.count("END_OF_REQUEST") == 1
    assert subprocess.run(["sh", "-n"], input=texts["request.sh"], text=True, check=False).returncode == 0
