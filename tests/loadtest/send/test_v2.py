"""Servers that speak the V2 protocol and nothing of Triton's extensions, over HTTP and gRPC."""

# ruff: noqa: N802 -- the method names are those of the HTTP library and of the protocol
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from loadtest.judge.summary import summarize
from loadtest.load import drive
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.counts import counted
from loadtest.send import wire
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import BadInput, ModelMissing, ServerFault, ServerNonsense
from modelathe.tensors import unpacked

PAYLOADS = [
    {"x": np.full((1, 4), n + 1, np.float32), "name": np.array([[b"a", "zwölf".encode()]], object)} for n in range(4)
]


class Model:
    """Doubles `x` and gives `name` back; from the `wrong_from`-th inference on it triples."""

    def __init__(self, wrong_from: int = 10**9) -> None:
        self.wrong_from, self.asked = wrong_from, 0

    def double(self, x: list[float]) -> list[float]:
        self.asked += 1
        return [(3 if self.asked >= self.wrong_from else 2) * value for value in x]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    model: Model
    named = True

    def do_GET(self) -> None:
        tensors = [
            {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
            {"name": "name", "datatype": "BYTES", "shape": [-1, 2]},
        ]
        known: dict[str, Any] = {
            "/v2/health/ready": {},
            "/v2": {"name": "other", "version": "1.6.0", "extensions": []},
            "/v2/models/double/ready": {},
            "/v2/models/double": {
                "name": "double",
                "versions": [],
                "platform": "",
                "inputs": tensors if self.named else [],
                "outputs": tensors if self.named else [],
            },
        }
        if self.path in known:
            self.say(200, known[self.path])
        else:
            self.say(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v2/models/double/infer":
            self.say(404, {"detail": "Not Found"})
        elif "Inference-Header-Content-Length" in self.headers:
            self.say(400, {"error": "the body is not JSON"})
        else:
            inputs = {one["name"]: one for one in json.loads(body)["inputs"]}
            x = inputs["x"]
            doubled = np.array(self.model.double(x["data"])).reshape(x["shape"]).tolist()
            outputs = [{"name": "x", "datatype": "FP32", "shape": x["shape"], "data": doubled}]
            outputs += [inputs["name"]] if "name" in inputs else []
            self.say(200, {"model_name": "double", "outputs": outputs})

    def say(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: Any) -> None: ...


class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    """What it does not define is UNIMPLEMENTED."""

    def __init__(self, model: Model, raw: bool) -> None:
        self.model, self.raw = model, raw

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name == "double")

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="other", version="1.6.0")

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        if request.name != "double":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
        tensors = [
            {"name": "x", "datatype": "FP32", "shape": [-1, 4]},
            {"name": "name", "datatype": "BYTES", "shape": [-1, 2]},
        ]
        return service_pb2.ModelMetadataResponse(name="double", inputs=tensors, outputs=tensors)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        x, strings = request.raw_input_contents
        doubled = self.model.double(np.frombuffer(x, np.float32).tolist())
        outputs = [{"name": "x", "datatype": "FP32", "shape": [1, 4]}, {"name": "name", "datatype": "BYTES"}]
        outputs[1]["shape"] = [1, 2]
        if self.raw:
            raw = [np.array(doubled, np.float32).tobytes(), strings]
            return service_pb2.ModelInferResponse(model_name="double", outputs=outputs, raw_output_contents=raw)
        outputs[0]["contents"] = {"fp32_contents": doubled}
        outputs[1]["contents"] = {"bytes_contents": unpacked("BYTES", [2], strings).tolist()}
        return service_pb2.ModelInferResponse(model_name="double", outputs=outputs)


@contextmanager
def serving(kind: str, model: Model) -> Iterator[str]:
    """Yield the URL of a server: `json`, `unnamed` (JSON, and it names no tensors), `raw` or `typed` (gRPC)."""
    if kind in ("json", "unnamed"):
        with web(type("Own", (Handler,), {"model": model, "named": kind == "json"})) as url:
            yield url
        return
    rpc = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(model, kind == "raw"), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        rpc.stop(0).wait()


@contextmanager
def web(handler: type[Handler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


KINDS = pytest.mark.parametrize("kind", ["json", "raw", "typed"])


@KINDS
@pytest.mark.parametrize("wrong_from", [10**9, 20])
def test_the_load_goes_on_and_outputs_are_checked(kind: str, wrong_from: int, tmp_path: Path) -> None:
    with serving(kind, Model(wrong_from)) as url:
        plan = Plan(url, 60.0, concurrency=2, requests=60, warmup=0.0)
        drive.run(plan, [Part("double", PAYLOADS, tolerance=0.0)], tmp_path / "r.jsonl")
    values = summarize(tmp_path / "r.jsonl")
    requests = values["requests"]
    assert requests["failed"] == 0, values["errors"]
    assert requests["mismatched"] == (0 if wrong_from > 60 else 60 - (wrong_from - 1 - len(PAYLOADS)))
    assert values["checked"] == 60
    assert values["server"] is None
    unknown = [note for note in values["notes"] if note.startswith("not known")]
    assert len(unknown) == 2
    assert "statistics" in unknown[1]
    assert values["plan"]["connection"]["binary"] == (kind != "json")
    if wrong_from < 60:
        assert "differs" in values["errors"][0]["text"]


@KINDS
def test_what_such_a_server_is_asked(kind: str) -> None:
    with serving(kind, Model()) as url, connect(url, timeout=10) as client:
        [x, _], _ = client.metadata("double")
        assert (x.name, x.dtype, x.batched) == ("x", "float32", False)
        assert client.served_version("double") == ""
        assert counted(client, "double") is None
        outputs = client.infer("double", PAYLOADS[1])
        np.testing.assert_array_equal(outputs["x"], 2 * PAYLOADS[1]["x"])
        assert outputs["name"].tolist() == PAYLOADS[1]["name"].tolist()
        for ask in (client.metadata, client.served_version):
            with pytest.raises(ModelMissing, match="'nope'"):
                ask("nope")


def test_a_server_of_something_else_is_still_none() -> None:
    class Other(Handler):
        def do_GET(self) -> None:
            self.say(404, {"detail": "Not Found"})

    with web(Other) as url, connect(url, timeout=10) as client, pytest.raises(ServerNonsense):
        client.metadata("double")


def test_a_server_that_says_it_takes_bytes_is_not_asked_again_in_json() -> None:
    asked: list[int] = []

    class Refusing(Handler):
        def do_GET(self) -> None:
            self.say(200, {"name": "other", "version": "1", "extensions": ["binary_tensor_data"]})

        def do_POST(self) -> None:
            asked.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.say(500, {"error": "out of memory"})

    with web(Refusing) as url, connect(url, timeout=10) as client, pytest.raises(ServerFault, match="out of memory"):
        client.infer("double", PAYLOADS[0])
    assert len(asked) == 1


@pytest.mark.parametrize("more", [["--shape", "x:1,4"], ["--data"], []])
def test_a_server_that_names_no_tensors(more: list[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(12, dtype=np.float32).reshape(3, 1, 4))
    more = [*more, str(tmp_path / "data.npz")] if more == ["--data"] else more
    with serving("unnamed", Model()) as url:
        command = [sys.executable, "-m", "loadtest", "run", "double", "--url", url, "--requests", "20", *more]
        options = [
            "--warmup",
            "0s",
            "--json",
            "--allow-invalid",
            "--tolerance",
            "0",
            "--output",
            str(tmp_path / "r.jsonl"),
        ]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    if not more:
        assert done.returncode == 2
        assert "does not say which inputs" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checked"] == 20


@pytest.mark.parametrize("value", [np.array([np.nan], np.float32), np.array([b"\xff"], object)])
def test_what_json_cannot_hold_is_refused(value: np.ndarray) -> None:
    with pytest.raises(BadInput, match="cannot be written as JSON"):
        wire.HttpRequests("h:1", Connection(binary=False)).request("m", {"x": value})


NO_VALUES: list[Any] = [["1", "2"], [None, 1.0], [1.0], [1.0, 2.0, 3.0], "x", {"a": 1}, [[1.0], [2.0, 3.0]]]


@pytest.mark.parametrize("data", [[1.0, 2.0], [[1.0, 2.0]], *NO_VALUES])
def test_outputs_in_json(data: Any) -> None:
    answer = {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": data}]}
    if data not in NO_VALUES:
        assert wire.http_outputs(json.dumps(answer).encode(), b"")["y"].tolist() == [[1.0, 2.0]]
    else:
        with pytest.raises((BadInput, ValueError)):
            wire.http_outputs(json.dumps(answer).encode(), b"")


def test_json_and_bytes_in_one_answer() -> None:
    outputs = [
        {"name": "a", "datatype": "INT64", "shape": [2], "parameters": {"binary_data_size": 16}},
        {"name": "b", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        {"name": "c", "datatype": "BYTES", "shape": [1], "data": ["ä"]},
    ]
    raw = np.array([5, -5]).tobytes()
    found = wire.http_outputs(json.dumps({"outputs": outputs}).encode(), raw)
    assert {name: array.tolist() for name, array in found.items()} == {
        "a": [5, -5],
        "b": [True, False],
        "c": ["ä".encode()],
    }
    with pytest.raises(ValueError, match="17 bytes of outputs, 16 are described"):
        wire.http_outputs(json.dumps({"outputs": outputs}).encode(), raw + b"x")
