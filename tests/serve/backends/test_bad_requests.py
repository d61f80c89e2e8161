"""Bad requests to the real server: the code that each gets, and that the next good request is answered rightly."""

import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from modelathe.client import connect
from serve.config import settings as served
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny

GOOD = np.ones((2, 4), np.float32)
LIMITED = "limited"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path, publish_tiny: Any) -> Iterator[Endpoint]:
    """A server of this module's own: what is sent here might break it."""
    here = tmp_path_factory.mktemp("bad")
    place = here / "repository"
    publish_tiny(place)
    asked = served.read({"queue": 1, "queue_delay_us": 50_000, "max_batch": 2}, LIMITED)
    onnx = save_tiny(here / "tiny.onnx")
    with staging.stage(place, LIMITED, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1), asked) as staged:
        staging.publish(staged, {})
    with running(place, grace=0) as endpoint:
        yield endpoint


def answers_rightly(endpoint: Endpoint) -> bool:
    for url in (endpoint.http, endpoint.grpc):
        with connect(url) as client:
            answer = client.infer(TINY, {"x": GOOD})["y"]
        if not np.allclose(answer, GOOD @ TINY_WEIGHT):
            return False
    return True


@pytest.fixture(autouse=True)
def alive(server: Endpoint) -> Iterator[None]:
    yield
    assert answers_rightly(server)


def tensor(name: str = "x", shape: list[int] | None = None, datatype: str = "FP32", data: Any = None) -> dict[str, Any]:
    shape = [1, 4] if shape is None else shape
    return {"name": name, "shape": shape, "datatype": datatype, "data": [1.0] * 4 if data is None else data}


def post(endpoint: Endpoint, body: bytes, path: str = f"/v2/models/{TINY}/infer", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(endpoint.http).netloc, timeout=60)
    try:
        connection.request("POST", path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


# What tritonserver 24.10's core decides keeps its answer; docs/explanation/server.md lists what newer releases answer.
HTTP: dict[str, tuple[bytes, int, str]] = {
    "shape": (body(tensor(shape=[1, 5], data=[1.0] * 5)), 400, "unexpected shape for input 'x'"),
    "rank": (body(tensor(shape=[4])), 400, "unexpected shape for input 'x'"),
    "dtype": (body(tensor(datatype="INT64", data=[1] * 4)), 400, "inference input 'x' data-type is 'INT64'"),
    "unknown dtype": (body(tensor(datatype="FLOAT")), 400, "invalid datatype for input x"),
    "name": (body(tensor(name="z")), 400, "unexpected inference input 'z'"),
    "missing input": (body(), 400, "expected 1 inputs but got 0"),
    "no inputs at all": (b"{}", 500, "Unable to parse 'inputs'"),
    "extra input": (body(tensor(), tensor(name="z")), 400, "expected 1 inputs but got 2"),
    "unknown output": (body(tensor(), outputs=[{"name": "q"}]), 400, "unexpected inference output 'q'"),
    "batch over max": (body(tensor(shape=[33, 4], data=[1.0] * 132)), 400, "must be <= 32"),
    "empty tensor": (body(tensor(shape=[0, 4], data=[])), 400, "input byte size mismatch"),
    "negative shape": (body(tensor(shape=[-1, 4])), 500, "Unable to parse 'shape'"),
    "too few numbers": (body(tensor(data=[1.0])), 500, "Unable to parse"),
    "words for numbers": (body(tensor(data=["a"] * 4)), 500, "Unable to parse"),
    "invalid JSON": (b'{"inputs": [', 500, "failed to parse"),
    "not JSON": (bytes(range(256)), 500, "failed to parse"),
    "no body": (b"", 400, ""),
    "deep nesting": (b"[" * 100_000, 500, ""),
}


@pytest.mark.parametrize("fault", HTTP)
def test_over_http(server: Endpoint, fault: str) -> None:
    sent, status, says = HTTP[fault]
    got, text = post(server, sent)
    assert (got, says in text) == (status, True), text
    assert not any(word in text for word in ("Traceback", ".py", "/usr/", "/tmp/"))


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/models/nope/infer", 404),
        (f"/v2/models/{TINY}/versions/9/infer", 404),
        (f"/v2/models/{TINY}/versions/one/infer", 404),
        ("/v2/models/..%2f..%2fetc/infer", 404),
        ("/v3/models", 404),
    ],
)
def test_unknown_models_versions_and_paths(server: Endpoint, path: str, status: int) -> None:
    assert post(server, body(tensor()), path)[0] == status


def test_binary_sizes_that_do_not_fit(server: Endpoint) -> None:
    header = body({**tensor(), "data": None, "parameters": {"binary_data_size": 16}}).replace(b', "data": null', b"")
    for raw, length in ((b"\0" * 8, len(header)), (b"", len(header)), (b"\0" * 16, 10**6), (b"\0" * 16, 3)):
        status, text = post(server, header + raw, **{"Inference-Header-Content-Length": str(length)})
        assert status in (400, 500), text
    wrong = header.replace(b"16", b"99999999999999999999")
    assert post(server, wrong, **{"Inference-Header-Content-Length": str(len(wrong))})[0] in (400, 500)


def request(**changes: Any) -> service_pb2.ModelInferRequest:
    made = service_pb2.ModelInferRequest(
        model_name=changes.pop("model", TINY), model_version=changes.pop("version", "")
    )
    shape = changes.get("shape", [1, 4])
    made.inputs.add(name=changes.get("name", "x"), datatype=changes.get("datatype", "FP32"), shape=shape)
    made.raw_input_contents.append(changes.get("raw", struct.pack("4f", 1, 1, 1, 1)))
    return made


def call(endpoint: Endpoint, message: bytes) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(endpoint.grpc.removeprefix("grpc://")) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            ask(message, timeout=60)
        except grpc.RpcError as error:
            return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


INVALID = grpc.StatusCode.INVALID_ARGUMENT
GRPC: dict[str, tuple[dict[str, Any], grpc.StatusCode]] = {
    "shape": ({"shape": [1, 5], "raw": bytes(20)}, INVALID),
    "dtype": ({"datatype": "INT64", "raw": bytes(32)}, INVALID),
    "name": ({"name": "z"}, INVALID),
    "batch over max": ({"shape": [33, 4], "raw": bytes(33 * 16)}, INVALID),
    "empty tensor": ({"shape": [0, 4], "raw": b""}, INVALID),
    "too few bytes": ({"raw": bytes(3)}, INVALID),
    "too many bytes": ({"raw": bytes(99)}, INVALID),
    "a shape beyond memory": ({"shape": [2**40, 4], "raw": bytes(16)}, INVALID),
    "unknown model": ({"model": "nope"}, grpc.StatusCode.NOT_FOUND),
    "unknown version": ({"version": "9"}, grpc.StatusCode.NOT_FOUND),
    "a version that is no number": ({"version": "one"}, INVALID),
}


@pytest.mark.parametrize("fault", GRPC)
def test_over_grpc(server: Endpoint, fault: str) -> None:
    changes, code = GRPC[fault]
    got, text = call(server, request(**changes).SerializeToString())
    assert got == code, text
    assert text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("message", "code"), [(b"", grpc.StatusCode.NOT_FOUND), (b"\xff\xff\xff", grpc.StatusCode.INTERNAL)]
)
def test_grpc_messages_that_are_none(server: Endpoint, message: bytes, code: grpc.StatusCode) -> None:
    assert call(server, message)[0] == code


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_pass_unless_refused(server: Endpoint, value: float) -> None:
    with connect(server.grpc) as client:
        answer = client.infer(TINY, {"x": np.full((1, 4), value, np.float32)})["y"]
    assert not np.isfinite(answer).all()


def test_a_body_cut_off(server: Endpoint) -> None:
    address = urlsplit(server.http)
    for sent in (b"", b'{"inputs"', b"x" * 5000):
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            head = f"POST /v2/models/{TINY}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
            connection.sendall(head.encode() + sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(10) == b""


def test_what_is_not_http(server: Endpoint) -> None:
    address = urlsplit(server.http)
    for sent in (b"\0" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"POST / HTTP/9.9\r\n\r\n"):
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)


@pytest.mark.slow
def test_a_body_of_200_megabytes(server: Endpoint) -> None:
    status, _ = post(server, b"[" + b"1," * 100_000_000 + b"1]")
    assert status in (400, 413, 500)


def test_a_flood_over_the_queues_limit(server: Endpoint) -> None:
    """With room for one to wait, some of a flood are refused at once, and none gets a wrong answer."""

    def ask(_: int) -> int:
        return post(server, body(tensor()), f"/v2/models/{LIMITED}/infer")[0]

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(ask, range(200)))
    assert set(statuses) == {200, 503}
    assert ask(0) == 200


def test_clients_that_leave(server: Endpoint) -> None:
    address = urlsplit(server.http)
    sent = body(tensor())
    head = f"POST /v2/models/{LIMITED}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n"
    for _ in range(20):
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(head.encode() + sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(20):
            ask.future(request(model=LIMITED).SerializeToString(), timeout=60).cancel()


def test_a_thousand_idle_connections(server: Endpoint) -> None:
    idle = []
    try:
        for url in (server.http, server.grpc):
            address = urlsplit(url)
            for _ in range(500):
                idle.append(socket.create_connection((address.hostname, address.port), timeout=30))
        assert answers_rightly(server)
    finally:
        for connection in idle:
            connection.close()


NAMES = st.sampled_from(["x", "y", "", "z", "x\0", "ÿ" * 300])
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.none(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(NAMES, NUMBERS),
        "shape": st.one_of(st.lists(st.integers(-(2**64), 2**64), max_size=4), st.just([1, 4]), NUMBERS),
        "datatype": st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "BF16", "", "FP99"]),
        "data": st.one_of(st.lists(NUMBERS, max_size=9), st.just([1.0] * 4), NUMBERS),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "classification", "a"]), NUMBERS, max_size=2
        ),
    },
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "id": NUMBERS,
        "inputs": st.one_of(st.lists(TENSORS, max_size=3), NUMBERS),
        "outputs": st.one_of(st.lists(TENSORS, max_size=2), NUMBERS),
        "parameters": st.dictionaries(
            st.sampled_from(["sequence_id", "sequence_start", "priority", "timeout", "binary_data_output"]),
            NUMBERS,
            max_size=3,
        ),
    },
)
SENT = st.one_of(
    BODIES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=300),
    st.builds(
        lambda good, at, junk: good[:at] + junk + good[at:],
        st.just(body(tensor())),
        st.integers(0, 90),
        st.binary(max_size=8),
    ),
)
MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda at, junk: (lambda good: good[:at] + junk + good[at + len(junk) :])(request().SerializeToString()),
        st.integers(0, 60),
        st.binary(max_size=8),
    ),
    st.builds(
        lambda name, kind, shape, raw: request(name=name, datatype=kind, shape=shape, raw=raw).SerializeToString(),
        NAMES,
        st.sampled_from(["FP32", "INT64", "BYTES", "BOOL", "BF16", ""]),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
        st.binary(max_size=64),
    ),
)
FUZZ = settings(
    max_examples=1100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Tally:
    """How many requests were sent, and what came back."""

    def __init__(self) -> None:
        self.codes: dict[object, int] = {}
        self.lock = threading.Lock()

    def add(self, code: object) -> None:
        with self.lock:
            self.codes[code] = self.codes.get(code, 0) + 1


def fuzzed(strategy: Any, send: Callable[[bytes], object]) -> Tally:
    tally = Tally()

    @FUZZ
    @given(strategy)
    def run(sent: bytes) -> None:
        tally.add(send(sent))

    run()
    return tally


@pytest.mark.slow
def test_a_thousand_fuzzed_bodies_over_http(server: Endpoint) -> None:
    lengths = st.one_of(st.none(), st.integers(-5, 400))

    def send(sent: tuple[bytes, int | None]) -> int:
        headers = {} if sent[1] is None else {"Inference-Header-Content-Length": str(sent[1])}
        status, text = post(server, sent[0], **headers)
        assert "Traceback" not in text
        return status

    tally = fuzzed(st.tuples(SENT, lengths), send)  # type: ignore[arg-type]
    assert sum(tally.codes.values()) >= 1000
    assert set(tally.codes) <= {200, 400, 404, 500}
    assert tally.codes.get(400, 0) > 100


@pytest.mark.slow
def test_a_thousand_fuzzed_messages_over_grpc(server: Endpoint) -> None:
    with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def send(sent: bytes) -> grpc.StatusCode:
            try:
                ask(sent, timeout=60)
            except grpc.RpcError as error:
                assert "Traceback" not in str(error.details())
                return error.code()
            return grpc.StatusCode.OK

        tally = fuzzed(MESSAGES, send)
    assert sum(tally.codes.values()) >= 1000
    known = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED"}
    assert {code.name for code in tally.codes} <= known  # type: ignore[attr-defined]
