"""Headers: the name that requests are for stands in them once, and long ones are told from a server that is none."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived

from loadtest.cli import main
from loadtest.selftest import nullserver
from loadtest.send import grpc as grpc_sender
from loadtest.send import wire
from modelathe.client import connect
from modelathe.connection import Connection
from modelathe.errors import ModelatheError, UsageError
from serve.server.endpoint import Endpoint
from tests.conftest import TINY

NAME = "tiny.models.example.com"
NAMED = pytest.mark.parametrize("header", ["Host", "host", ":authority"])


@contextmanager
def front(upstream: str) -> Iterator[str]:
    """What stands before servers of several names: it passes on what names this one, once."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            names = self.headers.get_all("Host")
            if names != [NAME]:
                self.reply(404, [], f"no route for {names}".encode())
                return
            inner = http.client.HTTPConnection(upstream.partition("//")[2])
            kept = {name: value for name, value in self.headers.items() if name != "Host"}
            inner.request(self.command, self.path, body, kept)
            found = inner.getresponse()
            passed = [pair for pair in found.getheaders() if pair[0].lower().startswith(("content-t", "inference"))]
            self.reply(found.status, passed, found.read())
            inner.close()

        do_GET = do_POST = answer  # noqa: N815

        def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for pair in [*headers, ("Content-Length", str(len(body)))]:
                self.send_header(*pair)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@NAMED
def test_a_server_that_is_one_of_several_names(header: str, tmp_path: Path) -> None:
    with nullserver.running() as server, front(server.http) as url:
        command = [
            "run",
            server.model,
            "--url",
            url,
            "--requests",
            "10",
            "--warmup",
            "0s",
            "--tolerance",
            "0",
            "--json",
        ]
        more = ["--allow-invalid", "--output", str(tmp_path / "r.jsonl")]
        done = CliRunner().invoke(main, [*command, *more, "--header", f"{header}: {NAME}"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["checked"] == 10
        assert CliRunner().invoke(main, [*command, *more]).exit_code == 5


@NAMED
def test_a_request_of_a_load_has_it_once(header: str) -> None:
    connection = Connection(headers=((header, NAME), ("x-a", "b")))
    sent = wire.HttpRequests("h:1", connection).request("m", {"x": np.zeros(1, np.float32)})
    lines = sent.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert [line for line in lines if line.lower().startswith((b"host:", b":auth"))] == [f"Host: {NAME}".encode()]
    assert b"x-a: b" in lines
    headers = grpc_sender._headers("grpc://h:1", connection)
    assert [value for name, value in headers if name in (":authority", "host")] == [NAME]
    assert grpc_sender.metadata(connection) == (("x-a", "b"),)


@NAMED
def test_a_question_over_grpc_has_it_once(header: str) -> None:
    found: list[list[tuple[str, str]]] = []

    def listen(server: socket.socket) -> None:
        with suppress(OSError), server.accept()[0] as peer:
            talk = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
            talk.initiate_connection()
            peer.sendall(talk.data_to_send())
            while some := peer.recv(65536):
                for event in talk.receive_data(some):
                    if isinstance(event, RequestReceived):
                        found.append(list(event.headers))
                        ending = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12")]
                        talk.send_headers(event.stream_id, ending, end_stream=True)
                peer.sendall(talk.data_to_send())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, args=(server,))
        thread.start()
        url = f"grpc://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ModelatheError), connect(url, 5, Connection(headers=((header, NAME), ("x-a", "b")))):
            pass
    thread.join()
    assert [value for name, value in found[0] if name in (":authority", "host")] == [NAME]
    assert ("x-a", "b") in found[0]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ((("Host", "a"), (":authority", "b")), "two headers say which name"),
        ((("Host", "a"), ("host", "a")), "two headers say which name"),
        ((("Content-Type", "application/json"),), "the header Content-Type says how a request is written"),
        ((("content-length", "3"),), "the header content-length says how a request is written"),
        (((":path", "/"),), "cannot be sent"),
    ],
)
def test_what_is_not_the_users_to_say(headers: tuple[tuple[str, str], ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Connection(headers=headers)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
@pytest.mark.parametrize("size", [9_000, 20_000, 70_000])
def test_headers_that_are_too_long_for_the_server(endpoint: Endpoint, scheme: str, size: int) -> None:
    url = getattr(endpoint, scheme)
    long = Connection(headers=(("authorization", "x" * size),))
    if scheme == "grpc" and size < 16_384:
        return  # between its two limits gRPC refuses at random
    with pytest.raises(UsageError, match=r"not with them") as caught, connect(url, 5, long):
        pass
    assert f"the {size + 17:,} bytes of headers" in caught.value.what
    assert "8,192 bytes in all" in caught.value.fix
    with connect(url, 5, Connection(headers=(("authorization", "x" * 4_000),))) as client:
        assert client.ready(TINY)


@pytest.mark.parametrize("size", [20_000, 200_000])
def test_an_answer_with_long_headers(size: int) -> None:
    """A gateway adds what it likes; gRPC's own limit is 8 kB."""
    import grpc
    from tritonclient.grpc import service_pb2

    def ready(_request: Any, context: Any) -> Any:
        context.send_initial_metadata((("x-trace", "a" * size),))
        return service_pb2.ServerReadyResponse(ready=True)

    from concurrent.futures import ThreadPoolExecutor

    call = grpc.unary_unary_rpc_method_handler(
        ready, service_pb2.ServerReadyRequest.FromString, lambda message: message.SerializeToString()
    )
    handlers = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerReady": call})
    server = grpc.server(ThreadPoolExecutor(1), handlers=(handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with connect(f"grpc://127.0.0.1:{port}", 5) as client:
            assert client.ready()
    finally:
        server.stop(0)
