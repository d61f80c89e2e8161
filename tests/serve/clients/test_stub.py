"""`serve stub` beside a real server over the same repository: the same statuses, and answers of the same form."""

import gzip
import http.client
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from loadtest.record import counts
from modelathe.client import connect
from modelathe.errors import ModelatheError, ModelMissing, RequestRejected, ServerFault
from serve.clients.standin.answers import load
from serve.clients.standin.running import Place, running
from serve.config.errors import BadRepository, PortTaken
from serve.server.endpoint import Endpoint
from tests.conftest import TINY
from tests.serve.commands.test_up import FREE, ROOT, serve
from tests.serve.kinds import ODD

ROW = struct.pack("<4f", 1, 2, 3, 4)
Reply = tuple[int, dict[str, str], bytes]


def ask(url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read()
    finally:
        connection.close()


def x(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in names}


def ids(name: str = "ids", rows: int = 1, length: int = 3, **changes: Any) -> dict[str, Any]:
    data = [1] * rows * length
    return {"name": name, "shape": [rows, length], "datatype": "INT64", "data": data, **changes}


def words(**changes: Any) -> dict[str, Any]:
    return {"name": ODD, "shape": [1, 2], "datatype": "BYTES", "data": ["a", "grün"], **changes}


def packed_words(size: int) -> dict[str, Any]:
    return {"inputs": [without(words(parameters={"binary_data_size": size}), "data")]}


def flag(**changes: Any) -> list[dict[str, Any]]:
    first = {"name": "a", "shape": [1, 1], "datatype": "FP64", "data": [1]}
    return [first, {"name": "b", "shape": [1, 1], "datatype": "BOOL", "data": [True], **changes}]


def one(**parameters: Any) -> dict[str, Any]:
    return {"inputs": [x(shape=[1, 1], data=[1])], "parameters": parameters}


def behind(**changes: Any) -> dict[str, Any]:
    return without(x(parameters={"binary_data_size": 16}, **changes), *(() if "data" in changes else ("data",)))


NOT_B = [{"name": "not_b"}]
BINARY = {"binary_data": True}
HALF = {"name": "h", "shape": [1, 3], "datatype": "FP16"}

IN_JSON: dict[str, tuple[str, Any]] = {
    "good": (TINY, {"inputs": [x()]}),
    "id": (TINY, {"id": "abc", "inputs": [x()]}),
    "id of a number": (TINY, {"id": 12, "inputs": [x()]}),
    "nested data": (TINY, {"inputs": [x(data=[[1, 2, 3, 4]])]}),
    "an output": (TINY, {"inputs": [x()], "outputs": [{"name": "y"}]}),
    "a binary output": (TINY, {"inputs": [x()], "outputs": [{"name": "y", "parameters": BINARY}]}),
    "all binary": (TINY, {"inputs": [x()], "parameters": {"binary_data_output": True}}),
    "all binary, one named": (
        TINY,
        {"inputs": [x()], "outputs": [{"name": "y"}], "parameters": {"binary_data_output": True}},
    ),
    "no outputs named": (TINY, {"inputs": [x()], "outputs": []}),
    "unknown output": (TINY, {"inputs": [x()], "outputs": [{"name": "z"}]}),
    "output without a name": (TINY, {"inputs": [x()], "outputs": [{}]}),
    "outputs no list": (TINY, {"inputs": [x()], "outputs": {}}),
    "binary flag of text": (TINY, {"inputs": [x()], "outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}),
    "binary outputs of text": (TINY, {"inputs": [x()], "parameters": {"binary_data_output": "yes"}}),
    "no inputs": (TINY, {}),
    "empty inputs": (TINY, {"inputs": []}),
    "inputs no list": (TINY, {"inputs": {}}),
    "an input no object": (TINY, {"inputs": [1]}),
    "a list": (TINY, []),
    "unknown input": (TINY, {"inputs": [x(name="z")]}),
    "one input more": (TINY, {"inputs": [x(), x(name="z")]}),
    "an input twice": (TINY, {"inputs": [x(), x()]}),
    "another dtype": (TINY, {"inputs": [x(datatype="INT32")]}),
    "no such dtype": (TINY, {"inputs": [x(datatype="FLOAT")]}),
    "dtype missing": (TINY, {"inputs": [without(x(), "datatype")]}),
    "shape missing": (TINY, {"inputs": [without(x(), "shape")]}),
    "name missing": (TINY, {"inputs": [without(x(), "name")]}),
    "data missing": (TINY, {"inputs": [without(x(), "data")]}),
    "another size": (TINY, {"inputs": [x(shape=[1, 5], data=[1] * 5)]}),
    "too few dims": (TINY, {"inputs": [x(shape=[4])]}),
    "too many dims": (TINY, {"inputs": [x(shape=[1, 4, 1])]}),
    "no dims": (TINY, {"inputs": [x(shape=[])]}),
    "batch above the largest": (TINY, {"inputs": [x(shape=[33, 4], data=[1] * 132)]}),
    "largest batch": (TINY, {"inputs": [x(shape=[32, 4], data=[1] * 128)]}),
    "batch of nothing": (TINY, {"inputs": [x(shape=[0, 4], data=[])]}),
    "negative batch": (TINY, {"inputs": [x(shape=[-1, 4])]}),
    "shape of a fraction": (TINY, {"inputs": [x(shape=[1.0, 4])]}),
    "shape of text": (TINY, {"inputs": [x(shape="1,4")]}),
    "too few values": (TINY, {"inputs": [x(data=[1, 2, 3])]}),
    "too many values": (TINY, {"inputs": [x(data=[1, 2, 3, 4, 5])]}),
    "numbers of text": (TINY, {"inputs": [x(data=["1", "2", "3", "4"])]}),
    "numbers of flags": (TINY, {"inputs": [x(data=[True, False, True, True])]}),
    "null": (TINY, {"inputs": [x(data=[None, 1, 1, 1])]}),
    "data no list": (TINY, {"inputs": [x(data=1)]}),
    "parameters no object": (TINY, {"inputs": [x()], "parameters": [1]}),
    "parameter of a list": (TINY, {"inputs": [x()], "parameters": {"mine": [1]}}),
    "shared memory": (TINY, {"inputs": [without(x(parameters={"shared_memory_region": "r"}), "data")]}),
    "no such model": ("none", {"inputs": [x()]}),
    "version": (f"{TINY}/versions/1", {"inputs": [x()]}),
    "no such version": (f"{TINY}/versions/9", {"inputs": [x()]}),
    "version of text": (f"{TINY}/versions/new", {"inputs": [x()]}),
    "two inputs": ("tokens", {"inputs": [ids("mask"), ids()]}),
    "longer than was stated": ("tokens", {"inputs": [ids(length=200), ids("mask", length=200)]}),
    "dims of nothing": ("tokens", {"inputs": [ids(length=0), ids("mask", length=0)]}),
    "an input missing": ("tokens", {"inputs": [ids()]}),
    "one of two unknown": ("tokens", {"inputs": [ids(), ids("z")]}),
    "different batches": ("tokens", {"inputs": [ids(), ids("mask", 2)]}),
    "fraction for a whole number": ("tokens", {"inputs": [ids(data=[1.5, 1, 1]), ids("mask")]}),
    "whole number with a point": ("tokens", {"inputs": [ids(data=[1.0, 1, 1]), ids("mask")]}),
    "too large a number": ("tokens", {"inputs": [ids(data=[2**63, 1, 1]), ids("mask")]}),
    "outputs in another order": (
        "tokens",
        {"inputs": [ids(), ids("mask")], "outputs": [{"name": "seen"}, {"name": "rows"}]},
    ),
    "strings": ("1-odd.strings", {"inputs": [words()]}),
    "strings of numbers": ("1-odd.strings", {"inputs": [words(data=[1, 2])]}),
    "too few strings": ("1-odd.strings", {"inputs": [words(data=["a"])]}),
    "flags": ("pair", {"inputs": flag(), "outputs": NOT_B}),
    "flags of numbers": ("pair", {"inputs": flag(data=[1]), "outputs": NOT_B}),
    "FP16 from JSON": ("halves", {"inputs": [{**HALF, "data": [1, 2, 3]}]}),
    "FP16 to JSON": ("pair", {"inputs": flag()}),
    "FP16 to bytes": ("pair", {"inputs": flag(), "outputs": [{"name": "half", "parameters": BINARY}, *NOT_B]}),
    "without a batch axis": ("unbatched", {"inputs": [x(name="numbers", shape=[3], data=[1, 2, 3])]}),
    "a batch axis too many": ("unbatched", {"inputs": [x(name="numbers", shape=[1, 3], data=[1, 2, 3])]}),
    "no sequence": ("sums", one()),
    "sequence not begun": ("sums", one(sequence_id=77)),
    "sequence": ("sums", one(sequence_id=7, sequence_start=True, sequence_end=True)),
    "sequence of a name": ("sums", one(sequence_id="abc", sequence_start=True, sequence_end=True)),
    "sequence of a fraction": ("sums", one(sequence_id=1.5, sequence_start=True)),
    "sequence start of text": ("sums", one(sequence_id=3, sequence_start="yes")),
    "sequences are one by one": (
        "sums",
        {"inputs": [x(shape=[2, 1], data=[1, 1])], "parameters": {"sequence_id": 9, "sequence_start": True}},
    ),
    "what the server keeps": (
        "sums",
        {
            "inputs": [x(shape=[1, 1], data=[1]), x(name="sum", shape=[1, 1], data=[1])],
            "parameters": {"sequence_id": 5},
        },
    ),
}
PACKED = (struct.pack("<I", 2) + b"ab") * 2
IN_BYTES: dict[str, tuple[str, dict[str, Any], bytes, Any]] = {
    "good": (TINY, {"inputs": [behind()]}, ROW, None),
    "too short": (TINY, {"inputs": [behind()]}, ROW[:8], None),
    "too long": (TINY, {"inputs": [behind()]}, ROW + b"abcd", None),
    "size too small": (TINY, {"inputs": [behind() | {"parameters": {"binary_data_size": 12}}]}, ROW[:12], None),
    "size of text": (TINY, {"inputs": [behind() | {"parameters": {"binary_data_size": "16"}}]}, ROW, None),
    "size below nothing": (TINY, {"inputs": [behind() | {"parameters": {"binary_data_size": -16}}]}, ROW, None),
    "no size": (TINY, {"inputs": [without(behind(), "parameters")]}, ROW, None),
    "data and bytes": (TINY, {"inputs": [behind(data=[1, 2, 3, 4])]}, ROW, None),
    "header beyond the body": (TINY, {"inputs": [behind()]}, ROW, 9999),
    "header cut": (TINY, {"inputs": [behind()]}, ROW, 5),
    "header below nothing": (TINY, {"inputs": [behind()]}, ROW, -3),
    "header of text": (TINY, {"inputs": [behind()]}, ROW, "abc"),
    "strings": (
        "1-odd.strings",
        {"inputs": [without(words(parameters={"binary_data_size": 12}), "data")]},
        PACKED,
        None,
    ),
    "a string too few": ("1-odd.strings", packed_words(6), PACKED[:6], None),
    "a string cut": ("1-odd.strings", packed_words(11), PACKED[:11], None),
    "FP16": (
        "halves",
        {
            "inputs": [{**HALF, "parameters": {"binary_data_size": 6}}],
            "outputs": [{"name": "minus", "parameters": BINARY}],
        },
        bytes(6),
        None,
    ),
}


def form(reply: Reply) -> Any:
    """What of an answer must be the same: everything but values, and the words of a refusal."""
    status, headers, body = reply
    if status != 200:
        assert json.loads(body)["error"]
        return status
    length = int(headers.get("Inference-Header-Content-Length", len(body)))
    document = json.loads(body[:length])
    behind = len(body) - length
    for output in document["outputs"]:
        if "data" in output:
            output["data"] = len(output["data"])
        elif output["datatype"] == "BYTES":
            behind -= output.pop("parameters")["binary_data_size"]
    return status, document, behind


@pytest.mark.parametrize("case", IN_JSON)
def test_json_is_answered_as_by_the_server(served: Endpoint, stub: Place, case: str) -> None:
    model, document = IN_JSON[case]
    body = json.dumps(document).encode()
    real, ours = (ask(place.http, "POST", f"/v2/models/{model}/infer", body) for place in (served, stub))
    assert form(ours) == form(real), (real, ours)


@pytest.mark.parametrize("case", IN_BYTES)
def test_bytes_are_answered_as_by_the_server(served: Endpoint, stub: Place, case: str) -> None:
    model, document, raw, length = IN_BYTES[case]
    header = json.dumps(document).encode()
    headers = {"Inference-Header-Content-Length": str(len(header) if length is None else length)}
    real, ours = (
        ask(place.http, "POST", f"/v2/models/{model}/infer", header + raw, headers) for place in (served, stub)
    )
    assert form(ours) == form(real), (real, ours)


@pytest.mark.parametrize("body", [b"", b"hello", b'{"inputs": []} x', b"\xff", b"[" * 100_000])
def test_what_is_no_request_is_refused_as_by_the_server(stub: Place, served: Endpoint, body: bytes) -> None:
    real, ours = (ask(place.http, "POST", f"/v2/models/{TINY}/infer", body) for place in (served, stub))
    assert form(ours) == form(real)


def test_compressed_requests(served: Endpoint, stub: Place) -> None:
    body = gzip.compress(json.dumps(IN_JSON["good"][1]).encode())
    for encoding in ("gzip", "br"):
        real, ours = (
            ask(place.http, "POST", f"/v2/models/{TINY}/infer", body, {"Content-Encoding": encoding})
            for place in (served, stub)
        )
        assert form(ours) == form(real)
    assert ask(stub.http, "POST", f"/v2/models/{TINY}/infer", b"no", {"Content-Encoding": "gzip"})[0] == 400


PATHS = [
    "/v2/health/live",
    "/v2/health/ready",
    *(
        f"/v2/models/{model}{version}{question}"
        for model in (TINY, "tokens", "sums", "none")
        for version in ("", "/versions/1", "/versions/9", "/versions/new")
        for question in ("", "/ready", "/config", "/stats")
    ),
    "/v2/models/stats",
    "/v2/nothing",
    "/v2/models",
    "/",
]


def test_questions_have_the_servers_statuses(served: Endpoint, stub: Place) -> None:
    for path in PATHS:
        for method in ("GET", "POST"):
            real, ours = (ask(place.http, method, path, None)[0] for place in (served, stub))
            assert ours == real, (method, path)
    for model in ("tokens", "sums", "1-odd.strings", "unbatched"):
        real, ours = (json.loads(ask(place.http, "GET", f"/v2/models/{model}")[2]) for place in (served, stub))
        assert without(ours, "platform") == without(real, "platform")
        real, ours = (json.loads(ask(place.http, "GET", f"/v2/models/{model}/config")[2]) for place in (served, stub))
        for key in ("name", "backend", "max_batch_size", "input", "output", "version_policy", "parameters"):
            assert ours[key] == real[key], (model, key)
    assert json.loads(ask(stub.http, "GET", "/v2")[2])["name"] == "modelathe stub"
    index = json.loads(ask(stub.http, "POST", "/v2/repository/index")[2])
    assert {"name": TINY, "version": "1", "state": "READY"} in index


GRPC: dict[str, dict[str, Any]] = {
    "good": {},
    "no such model": {"model_name": "none"},
    "no such version": {"model_version": "9"},
    "version of text": {"model_version": "new"},
    "too few bytes": {"raw": [ROW[:8]]},
    "no data": {"raw": []},
    "dtype": {"datatype": "INT32"},
    "no such dtype": {"datatype": "FLOAT"},
    "size": {"shape": [1, 5], "raw": [ROW + ROW[:4]]},
    "dims": {"shape": [4]},
    "batch": {"shape": [33, 4], "raw": [ROW * 33]},
    "negative": {"shape": [-1, 4]},
    "name": {"name": "z"},
    "output": {"output": "z"},
    "an output": {"output": "y"},
    "values in the message": {"raw": [], "fp32_contents": [1, 2, 3, 4]},
    "too few values": {"raw": [], "fp32_contents": [1, 2, 3]},
    "values of another type": {"raw": [], "int_contents": [1, 2, 3, 4]},
    "values and bytes": {"fp32_contents": [1, 2, 3, 4]},
}


@pytest.mark.parametrize("case", GRPC)
def test_grpc_is_answered_as_by_the_server(served: Endpoint, stub: Place, case: str) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    asked = {"model_name": TINY, "model_version": "", "name": "x", "datatype": "FP32", "shape": [1, 4], "raw": [ROW]}
    asked |= GRPC[case]
    request = service_pb2.ModelInferRequest(
        model_name=asked["model_name"], model_version=asked["model_version"], raw_input_contents=asked["raw"], id="i"
    )
    tensor = request.inputs.add(name=asked["name"], datatype=asked["datatype"], shape=asked["shape"])
    for field in ("fp32_contents", "int_contents"):
        getattr(tensor.contents, field).extend(asked[field]) if field in asked else None
    if "output" in asked:
        request.outputs.add(name=asked["output"])
    found = []
    for place in (served, stub):
        address = place.grpc.removeprefix("grpc://")
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
                sizes = [len(raw) for raw in answer.raw_output_contents]
                found.append((answer.model_name, answer.model_version, answer.id, list(answer.outputs), sizes))
            except grpc.RpcError as error:
                found.append(error.code())
    assert found[0] == found[1]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_our_own_client_cannot_tell(stub: Place, scheme: str) -> None:
    rows = np.ones((3, 4), np.float32)
    with connect(getattr(stub, scheme)) as client:
        assert client.models() == list(stub.models)
        inputs, _ = client.metadata(TINY)
        assert inputs[0].shape(1) == (1, 4)
        assert (client.served_version(TINY), client.ready(TINY), client.ready(TINY, "9")) == ("1", True, False)
        before = counts.counted(client, TINY)
        assert not client.infer(TINY, {"x": rows})["y"].any()
        with pytest.raises(RequestRejected, match="unexpected shape for input 'x'"):
            client.infer(TINY, {"x": rows[:, :3]})
        counted = counts.counted(client, TINY) - before
        assert (counted.success, counted.fail, counted.inference_count) == (1, 1, 3)
        with pytest.raises(ModelMissing, match="'nobody'"):
            client.infer("nobody", {"x": rows})
        longer = {name: np.ones((2, 37), np.int64) for name in ("ids", "mask")}
        assert {name: array.shape for name, array in client.infer("tokens", longer).items()} == {
            "rows": (2, 37, 2),
            "seen": (2, 37),
        }


def test_random_answers_stay_and_some_fail(kinds: Path) -> None:
    rows = {"x": np.ones((2, 4), np.float32)}
    found = []
    for _ in range(2):
        with running(load(kinds, "random", 0.001, 3)) as place, connect(place.http) as client:
            found += [client.infer(TINY, rows)["y"] for _ in range(2)]
            with pytest.raises(ServerFault, match="one of 3 inferences fail"):
                client.infer(TINY, rows)
            client.infer(TINY, rows)
            counted = counts.counted(client, TINY)
            assert (counted.success, counted.fail, counted.success_ns) == (3, 1, 3_000_000)
            assert client.infer("1-odd.strings", {ODD: np.full((1, 2), b"a", object)})["class"].all()
    assert found[0].any()
    for array in found[1:]:
        np.testing.assert_array_equal(array, found[0])


def test_configurations_alone_are_enough(kinds: Path, tmp_path: Path) -> None:
    for model in (TINY, "tokens"):
        (tmp_path / model).mkdir()
        shutil.copy(kinds / model / "config.pbtxt", tmp_path / model)
    with running(load(tmp_path)) as place, connect(place.grpc) as client:
        assert client.infer(TINY, {"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 3)
        # Nobody says that the outputs' dim is the inputs'.
        longer = {name: np.ones((2, 37), np.int64) for name in ("ids", "mask")}
        assert client.infer("tokens", longer)["rows"].shape == (2, 1, 2)
    with pytest.raises(BadRepository, match="does not exist"), running(load(tmp_path / "none")):
        pass


def test_a_port_that_is_taken(kinds: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name in ("http_port", "grpc_port"):
            with pytest.raises(PortTaken, match=f"{port} cannot be used"), running(load(kinds), **{name: port}):
                pass
        done = serve("stub", str(kinds), "--http-port", str(port), "--grpc-port", "0")
    assert done.returncode == 5
    assert done.stderr.startswith(f"error: --http-port {port} cannot be used at 127.0.0.1: ")
    assert len(done.stderr.splitlines()) == 2


@contextmanager
def command(repository: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run `serve stub --json` and yield it, once ready, with its document."""
    line = [sys.executable, "-m", "serve", "stub", str(repository), *FREE[:4], "--json", *options]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = []
        try:
            for text in process.stdout:
                lines.append(text)
                if text == "}\n":
                    break
            yield process, json.loads("".join(lines))
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_until_a_signal(kinds: Path, number: int, code: int) -> None:
    with command(kinds, "--latency", "5ms", "--answers", "random") as (process, ready):
        with connect(ready["http"]) as client:
            # A connection stays open over the end.
            assert client.infer(TINY, {"x": np.ones((2, 4), np.float32)})["y"].any()
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        with pytest.raises(ModelatheError):
            connect(ready["http"], timeout=5)
    assert process.returncode == code
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) <= 2


def test_a_load_test_of_the_stub(stub: Place, tmp_path: Path) -> None:
    for url in (stub.http, stub.grpc):
        line = [sys.executable, "-m", "loadtest", "run", TINY, "--url", url, "--duration", "1s", "--warmup", "100ms"]
        done = subprocess.run(
            [*line, "--concurrency", "2", "--output", str(tmp_path / "load.jsonl"), "--json", "--allow-invalid"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert document["server"]["reconciled"], document["server"]
        assert document["requests"]["done"] > 0
