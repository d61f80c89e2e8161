import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from loadtest.record import counts
from loadtest.record.counts import Statistics
from loadtest.selftest import nullserver
from modelathe import translation
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import (
    BadInput,
    MachineError,
    ModelatheError,
    ModelMissing,
    RequestRejected,
    ServerAbsent,
    ServerFault,
    ServerNonsense,
    UsageError,
)
from modelathe.tensors import BATCH, UNBOUNDED, Dim, TensorSpec
from serve.config.address import parse_url

SCHEMES = pytest.mark.parametrize("scheme", ["http", "grpc"])
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@contextmanager
def talker(answer: bytes) -> Iterator[int]:
    """A port where every connection gets `answer` and is closed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@SCHEMES
def test_a_model_is_described_asked_and_counted(stand_in, scheme: str) -> None:
    with stand_in() as server, connect(server.url(scheme)) as client:
        assert client.ready()
        assert client.ready("double")
        assert not client.ready("nope")
        assert client.models() == ["double"]
        [x], [y] = client.metadata("double")
        assert (x.name, x.dtype, x.dims) == ("x", "float32", (Dim("batch", 1, 8, 8), 4))
        assert y.name == "y"
        assert client.served_version("double") == "1"
        before = counts.counted(client, "double")
        np.testing.assert_array_equal(client.infer("double", {"x": X})["y"], 2 * X)
        counted = counts.counted(client, "double") - before
        assert (counted.success, counted.inference_count) == (1, 1)
        assert counted.success_ns > 0


@SCHEMES
def test_an_open_size_is_unbounded(stand_in, scheme: str) -> None:
    with stand_in(size=-1) as server, connect(server.url(scheme)) as client:
        [x], _ = client.metadata("double")
        assert x.dims == (Dim("batch", 1, 8, 8), Dim("x_1", 1, 1, UNBOUNDED))


@SCHEMES
def test_an_unknown_model_is_named_beside_those_that_are_there(stand_in, scheme: str) -> None:
    with stand_in() as server, connect(server.url(scheme)) as client:
        for ask in (client.metadata, client.model_stats, lambda name: client.infer(name, {"x": X})):
            with pytest.raises(ModelMissing, match="'nope'") as caught:
                ask("nope")
            assert "double" in caught.value.fix


REFUSALS = [
    (400, grpc.StatusCode.INVALID_ARGUMENT, RequestRejected),
    (500, grpc.StatusCode.INTERNAL, ServerFault),
    (503, grpc.StatusCode.UNAVAILABLE, ServerFault),
]


@SCHEMES
@pytest.mark.parametrize(("http", "code", "kind"), REFUSALS)
def test_a_refusal_keeps_the_servers_words(stand_in, scheme: str, http: int, code, kind: type[ModelatheError]) -> None:
    text = "Exceeds maximum queue size"
    with (
        stand_in(refuse=(http, code, text)) as server,
        connect(server.url(scheme)) as client,
        pytest.raises(kind, match=text),
    ):
        client.infer("double", {"x": X})


@SCHEMES
def test_no_server(scheme: str) -> None:
    with pytest.raises(ServerAbsent) as caught:
        connect(f"{scheme}://127.0.0.1:{free_port()}", timeout=5)
    assert caught.value.exit_code == 5
    assert caught.value.where.startswith(scheme)


@SCHEMES
@pytest.mark.parametrize(
    "answer", [b"220 mail.example ESMTP\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b""]
)
def test_something_else_listens(scheme: str, answer: bytes) -> None:
    with (
        talker(answer) as port,
        pytest.raises(MachineError) as caught,
        connect(f"{scheme}://127.0.0.1:{port}", timeout=5) as client,
    ):
        client.metadata("m")
    assert isinstance(caught.value, ServerAbsent | ServerNonsense)


def test_the_other_protocols_port(stand_in) -> None:
    with stand_in() as server:
        for url in (server.grpc.replace("grpc:", "http:"), server.http.replace("http:", "grpc:")):
            with pytest.raises(MachineError) as caught:
                connect(url, timeout=5)
            assert "port" in caught.value.fix


@SCHEMES
def test_a_server_that_never_answers(stand_in, scheme: str) -> None:
    with (
        stand_in(hang=threading.Event()) as server,
        connect(server.url(scheme), timeout=0.3) as client,
        pytest.raises(ServerAbsent, match="in time"),
    ):
        client.infer("double", {"x": X})


def test_every_grpc_status_has_an_error() -> None:
    assert set(translation.GRPC_ERRORS) == {code.name for code in grpc.StatusCode}


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode])
def test_every_grpc_status_ends_with_4_or_5(code: str) -> None:
    error = translation._from_status("grpc://h:1", f"StatusCode.{code}", "text")
    assert isinstance(error, BadInput | MachineError)
    assert error.fix


@pytest.mark.parametrize("url", ["", "h:1", "ftp://h:1", "http://h", "http://h:x", "http://h:1/m", "grpc://:1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="address"):
        parse_url(url)


def test_addresses() -> None:
    assert parse_url("grpc://localhost:8001") == ("grpc", "localhost:8001")
    assert parse_url("http://[::1]:8000/") == ("http", "[::1]:8000")


WIDE = 1_100_000
"""More float32 values than 4 MiB hold, which is gRPC's own limit of a message."""


@pytest.mark.parametrize(("inputs", "outputs"), [(4, WIDE), (WIDE, 4), (WIDE, WIDE)], ids=["answer", "request", "both"])
@pytest.mark.parametrize("streams", [0, 1])
def test_messages_above_grpcs_own_limit(inputs: int, outputs: int, streams: int) -> None:
    specs = [(TensorSpec(name, "float32", (BATCH, size)),) for name, size in (("x", inputs), ("y", outputs))]
    with (
        nullserver.running(inputs=specs[0], outputs=specs[1]) as server,
        connect(server.grpc, connection=Connection(streams=streams)) as client,
    ):
        answer = client.infer(server.model, {"x": np.zeros((1, inputs), np.float32)})
        assert answer["y"].shape == (1, outputs)


def test_a_load_whose_answers_are_above_grpcs_own_limit(tmp_path: Path) -> None:
    with nullserver.running(outputs=[TensorSpec("y", "float32", (BATCH, WIDE))]) as server:
        command = [sys.executable, "-m", "loadtest", "run", server.model, "--url", server.grpc, "--requests", "4"]
        more = [
            "--warmup",
            "0s",
            "--tolerance",
            "0",
            "--allow-invalid",
            "--json",
            "--output",
            str(tmp_path / "r.jsonl"),
        ]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checked"] == 4


def test_statistics_subtract() -> None:
    assert Statistics(success=5, queue_ns=7) - Statistics(success=2, queue_ns=3) == Statistics(success=3, queue_ns=4)
