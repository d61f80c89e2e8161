"""TLS, headers, compression and streams, against the real server where it can do them."""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtest.judge.summary import summarize
from loadtest.load import drive
from loadtest.load.loop import Progress
from loadtest.plan.data import payload
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Part
from loadtest.record.results import MISMATCH, read
from loadtest.selftest import nullserver
from loadtest.send import wire
from modelathe.client import connect
from modelathe.connection import Connection, address, base
from modelathe.errors import BadInput, ModelatheError, ServerAbsent, UsageError
from serve.server.endpoint import Endpoint
from serve.server.options import Listen, Tls
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_INPUTS, TINY_WEIGHT
from tests.serve.server.test_care import free_port, listens, needs_nginx, nginx
from tests.serve.server.test_server import eventually

PAYLOADS = payload.generate(TINY_INPUTS, 16, 0, batch=2)
STREAMS = pytest.mark.parametrize("streams", [0, 2])


def run(url: str, path: Path, connection: Connection, parts: list[Part] | None = None, **load: Any) -> dict[str, Any]:
    plan = Plan(url, **{"duration": 0.5, "concurrency": 4, "warmup": 0.0, "connection": connection, **load})
    drive.run(plan, parts or [Part(TINY, PAYLOADS, tolerance=1e-5)], path / "r.jsonl")
    return summarize(path / "r.jsonl")


def all_right(values: dict[str, Any]) -> None:
    requests = values["requests"]
    assert requests["done"] == requests["planned"] > 10, values["errors"]
    assert values["server"]["reconciled"]


@pytest.fixture(scope="module", params=["tls", "mutual"])
def encrypted(
    request: pytest.FixtureRequest, model_repository: Path, server_prefix: Path, certificates: Path
) -> Iterator[tuple[Endpoint, Connection]]:
    """A real server that speaks gRPC over TLS, and what it takes to reach it."""
    mutual, authority = request.param == "mutual", certificates / "ca.crt"
    tls = Tls(certificates / "server.crt", certificates / "server.key", authority if mutual else None)
    own = {"certificate": str(certificates / "client.crt"), "key": str(certificates / "client.key")}
    with running(model_repository, listen=Listen(tls=tls), grace=0) as endpoint:
        yield endpoint, Connection(authority=str(authority), **(own if mutual else {}))


@STREAMS
def test_grpc_over_tls(encrypted: tuple[Endpoint, Connection], streams: int, tmp_path: Path) -> None:
    endpoint, connection = encrypted
    url = endpoint.grpc.replace("grpc:", "grpcs:")
    all_right(run(url, tmp_path, Connection(**{**connection.__dict__, "streams": streams})))
    with pytest.raises(ServerAbsent, match="no connection") as caught, connect(url, 10):
        pass
    assert "authority" in caught.value.fix
    if connection.certificate:
        with pytest.raises(ServerAbsent), connect(url, 10, Connection(authority=connection.authority)):
            pass


@contextmanager
def far(port: int, seconds: float) -> Iterator[int]:
    """A port that stands for another one, and takes so long to reach it for each connection."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while some := await reader.read(1 << 16):
                writer.write(some)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(seconds)
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer), return_exceptions=True)

    async def listen() -> None:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
            stop = asyncio.Event()
            listening.set_result((asyncio.get_running_loop(), stop, server.sockets[0].getsockname()[1]))
            await stop.wait()

    listening: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()
    thread = threading.Thread(target=asyncio.run, args=(listen(),))
    thread.start()
    loop, stop, place = listening.result()
    try:
        yield place
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@STREAMS
def test_grpc_to_a_server_that_is_far(endpoint: Endpoint, streams: int, tmp_path: Path) -> None:
    with far(int(endpoint.grpc.rpartition(":")[2]), 0.4) as port:
        all_right(run(f"grpc://127.0.0.1:{port}", tmp_path, Connection(streams=streams), duration=2.0))


@needs_nginx
@pytest.mark.parametrize("mutual", [False, True])
def test_http_over_tls(endpoint: Endpoint, certificates: Path, mutual: bool, tmp_path: Path) -> None:
    authority = certificates / "ca.crt"
    own = {"certificate": str(certificates / "client.crt"), "key": str(certificates / "client.key")}
    with nginx(tmp_path / "nginx", endpoint, certificates, **({"clients": authority} if mutual else {})) as port:
        url = f"https://127.0.0.1:{port}"
        all_right(run(url, tmp_path, Connection(authority=str(authority), **(own if mutual else {}))))
        with pytest.raises(ServerAbsent, match=r"no encrypted connection.*CERTIFICATE_VERIFY_FAILED"), connect(url, 10):
            pass


INGRESS = """
pid nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    server {{
        listen 127.0.0.1:{port};
        location /team/models/ {{ proxy_pass {upstream}/; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""


@needs_nginx
def test_a_server_below_a_path(endpoint: Endpoint, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "nginx.conf").write_text(INGRESS.format(port=port, upstream=endpoint.http))
    command = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-g", "daemon off;"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: listens(port))
            all_right(run(f"http://127.0.0.1:{port}/team/models/", tmp_path, Connection()))
            with connect(f"http://127.0.0.1:{port}/team/models", 10) as client:
                assert client.ready(TINY)
            with connect(f"http://127.0.0.1:{port}/other", 10) as client, pytest.raises(ModelatheError):
                client.metadata(TINY)
        finally:
            process.terminate()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("scheme", ["http", "grpc", "stream"])
def test_compression(endpoint: Endpoint, scheme: str, algorithm: str, tmp_path: Path) -> None:
    url = endpoint.http if scheme == "http" else endpoint.grpc
    connection = Connection(compression=algorithm, streams=int(scheme == "stream"))
    parts = [Part(TINY, payload.generate(TINY_INPUTS, 16, 0, batch=32), tolerance=1e-5)]
    all_right(run(url, tmp_path, connection, parts))


@STREAMS
def test_a_stream_tells_answers_and_errors_apart(endpoint: Endpoint, streams: int, tmp_path: Path) -> None:
    # The wrong output of one payload and the wrong shape of another are found among right ones in flight.
    right = [{"y": inputs["x"] @ TINY_WEIGHT} for inputs in PAYLOADS]
    wrong = [{"y": outputs["y"] + (n == 3)} for n, outputs in enumerate(right)]
    payloads = [{"x": np.ones((2, 5), np.float32)} if n == 7 else inputs for n, inputs in enumerate(PAYLOADS)]
    parts = [Part(TINY, payloads, tolerance=1e-5, expected=wrong)]
    values = run(endpoint.grpc, tmp_path, Connection(streams=streams), parts, requests=64, duration=30, timeout=20)
    results = read(tmp_path / "r.jsonl")
    np.testing.assert_array_equal(results.of(MISMATCH), results.payload == 3)
    np.testing.assert_array_equal(results.of("error"), results.payload == 7)
    assert "shape" in values["errors"][0]["text"] + values["errors"][1]["text"]


@STREAMS
def test_a_server_that_dies_fails_what_was_in_flight(streams: int, tmp_path: Path) -> None:
    with nullserver.running(service=0.005) as server:

        def kill(progress: Progress) -> None:
            if progress.ended > 10:
                with suppress(ProcessLookupError):  # it was done before
                    os.kill(server.pid, signal.SIGKILL)

        parts = [Part(server.model, payload.generate(nullserver.INPUTS, 4, 0))]
        plan = Plan(server.grpc, 30.0, concurrency=4, warmup=0.0, connection=Connection(streams=streams))
        drive.run(plan, parts, tmp_path / "r.jsonl", kill)
    values = summarize(tmp_path / "r.jsonl")
    assert not values["valid"]
    assert "stopped answering" in values["why"]
    assert values["requests"]["done"] > 10


def test_headers_travel(tmp_path: Path) -> None:
    connection = Connection(headers=(("X-Tenant", "me"),))
    head, _, _ = wire.HttpRequests("h:1", connection).request("m", PAYLOADS[0]).partition(b"\r\n\r\n")
    assert b"\r\nX-Tenant: me\r\n" in head
    plan = Plan("http://h:1", 1.0, concurrency=1, connection=connection)
    assert plan.document()["connection"]["headers"] == (("X-Tenant", "hidden"),)
    assert Plan.from_document(json.loads(json.dumps(plan.document()))).connection.headers == (("X-Tenant", "hidden"),)


def test_a_compressed_request_is_smaller_and_says_so() -> None:
    inputs = {"x": np.zeros((8, 100), np.float32)}
    plain, packed = (
        wire.HttpRequests("h:1", Connection(compression=algorithm)).request("m", inputs) for algorithm in (None, "gzip")
    )
    head, _, body = packed.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert gzip.decompress(body) == plain.partition(b"\r\n\r\n")[2]
    assert f"Content-Length: {len(body)}".encode() in head
    assert len(packed) < len(plain) / 2


def test_requests_in_memory_say_where() -> None:
    places = [wire.Place("x", "FP32", (2, 4), "r", 64, 32)]
    _, _, body = wire.HttpRequests("h:1").shared_request("m", places, places).partition(b"\r\n\r\n")
    told = {"shared_memory_region": "r", "shared_memory_byte_size": 32, "shared_memory_offset": 64}
    assert json.loads(body)["inputs"] == [{"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": told}]
    message = service_pb2.ModelInferRequest.FromString(wire.grpc_shared_request("m", places, places))
    assert message.outputs[0].parameters["shared_memory_region"].string_param == "r"
    assert message.inputs[0].parameters["shared_memory_offset"].int64_param == 64


@pytest.mark.parametrize(
    ("url", "settings", "kind", "said"),
    [
        ("ftp://h:1", {}, UsageError, "not the address"),
        ("grpc://h:1/team", {}, UsageError, "not the address"),
        ("http://h:1/team?x=1", {}, UsageError, "not the address"),
        ("http://h:1/a b", {}, UsageError, "not the address"),
        ("http://h:1", {"authority": "x"}, UsageError, "is not encrypted"),
        ("https://h:1", {"authority": "/none"}, BadInput, "no such file"),
        ("http://h:1", {"streams": 1}, UsageError, "matter of gRPC"),
        ("grpc://h:1", {"streams": -1}, UsageError, "-1 streams"),
        ("grpcs://h:1", {"certificate": "x"}, UsageError, "without its key"),
        ("grpc://h:1", {"headers": (("a b", "c"),)}, UsageError, "cannot be sent"),
        ("grpc://h:1", {"headers": (("a", "b\r\nc: d"),)}, UsageError, "cannot be sent"),
        ("grpc://h:1", {"compression": "zip"}, UsageError, "no compression 'zip'"),
        ("grpc://h:1", {"shared_memory": "disk"}, UsageError, "no shared memory 'disk'"),
    ],
)
def test_wrong_settings(url: str, settings: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Plan(url, 1.0, concurrency=1, connection=Connection(**settings))


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("not PEM")
    with pytest.raises(BadInput, match="no certificate that can be used"):
        Connection(authority=str(tmp_path / "ca.crt")).check("https://h:1")


def test_addresses() -> None:
    assert address("grpcs://localhost:1") == ("grpc", "localhost:1", True)
    assert address("http://[::1]:8000/") == ("http", "[::1]:8000", False)
    assert address("https://h:1/team/models/") == ("http", "h:1", True)
    assert [base(url) for url in ("http://h:1", "http://h:1/", "http://h:1/team/a-b/")] == ["", "", "/team/a-b"]


def test_the_command_line(endpoint: Endpoint, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "run", TINY, "--duration", "300ms", "--json"]
    output = ["--output", str(tmp_path / "r.jsonl")]
    more = ["--streams", "2", "--compression", "gzip", "--header", "x-a: b"]
    done = subprocess.run([*command, *output, "--url", endpoint.grpc, *more], capture_output=True, text=True)
    values = json.loads(done.stdout)
    assert values["plan"]["connection"]["streams"] == 2, done.stderr
    assert values["requests"]["done"] > 0
    wrong = subprocess.run([*command, "--url", endpoint.grpc, "--header", "nonsense"], capture_output=True, text=True)
    assert (wrong.returncode, "NAME: VALUE" in wrong.stderr) == (2, True)
