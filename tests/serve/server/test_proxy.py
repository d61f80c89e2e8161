"""What nginx passes on to tritonserver: the raw path decides, however it is spelled."""

import http.server
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.server.endpoint import Endpoint
from tests.conftest import TINY
from tests.serve.server.test_care import needs_nginx, nginx

pytestmark = needs_nginx
PLAIN = re.compile(
    r"/v2/?|/v2/health/(live|ready)"
    r"|/v2/models/[^/%\\?#]+(/versions/\d+)?(/(infer|generate|generate_stream|ready|config|stats))?"
)


class Recorder(http.server.BaseHTTPRequestHandler):
    """In the place of tritonserver: it keeps the path and the headers of each request as they came."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def do_POST(self) -> None:
        self.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an nginx before the recorder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as behind:
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{behind.server_port}"
        endpoint = Endpoint(url, "", "", 0, Path(), (), "")
        with nginx(tmp_path_factory.mktemp("nginx"), endpoint, certificates) as port:
            yield port
        behind.shutdown()


@pytest.fixture(scope="module")
def trusting(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates / "ca.crt"))


def post(port: int, trusting: ssl.SSLContext, target: bytes, headers: str = "") -> int:
    """Send a request line as it is, without a library that would tidy it up, and return the status."""
    head = f" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n{headers}\r\n{{}}"
    with (
        socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(b"POST " + target + head.encode())
        answer = connection.recv(65536)
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else 400


@pytest.mark.parametrize(
    "path",
    [
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        f"/v2/models/{TINY}",
        f"/v2/models/{TINY}/infer",
        f"/v2/models/{TINY}/infer?a=b",
        f"/v2/models/{TINY}/versions/12/infer",
        f"/v2/models/{TINY}/generate_stream",
        "/v2/models/a.b-c_1/config",
        "/v2/models/stats",
    ],
)
def test_inference_metadata_and_health_are_passed_on(port: int, trusting: ssl.SSLContext, path: str) -> None:
    Recorder.seen.clear()
    assert post(port, trusting, path.encode(), "admin-key: guess\r\nX-Own: kept\r\n") == 200
    (seen,) = Recorder.seen
    assert seen[0] == path
    assert ("admin-key" in seen[1], seen[1]["x-own"]) == (False, "kept")


SPELLED = [
    "/v2/repository/models/m/load",
    "/v2/repository/index",
    "/v2/models/m/trace/setting",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/cudasharedmemory/status",
    "/v2/repository/models/x%2F..%2F..%2F..%2Fmodels%2Fy/load",
    "/v2/models/x%2F..%2F..%2F..%2Frepository%2Fmodels%2Fy/load",
    "/v2/systemsharedmemory/region/x%2F..%2F..%2F..%2Fmodels/register",
    "/v2/models/../repository/index",
    "/v2/models/x/../../repository/models/m/unload",
    "/v2/models/x/%2e%2e/%2e%2e/repository/models/m/load",
    "/v2/models/x/..%2f..%2frepository/models/m/load",
    "/v2/models/m%2finfer",
    "/v2/models/m%252F..%252Frepository/load",
    "/v2/%72epository/models/m/load",
    "/%76%32/repository/models/m/load",
    "/v2//repository/models/m/load",
    "//v2/repository/models/m/load",
    "/v2/./repository/models/m/load",
    "/v2/models/m/infer/../../../repository/models/m/load",
    "/v2/models/m\\..\\..\\repository/load",
    "/v2/models/m%5c..%5crepository/load",
    "/v2/models/m;/../repository/models/m/load",
    "/v2/models/m%00/infer",
    "/v2/models/m%0a/infer",
    "/v2/models/m/infer%3f/../load",
    "/v2/models/m/infer#/../load",
    "/V2/repository/index",
    "/v2/models/ä/infer",
    "/v2/models/m/infer/load",
    "http://x/v2/repository/models/m/load",
    "http://x/v2/models/x%2F..%2F..%2Frepository%2Findex",
    "/metrics",
    "*",
]


@pytest.mark.parametrize("path", SPELLED)
def test_nothing_else_reaches_the_server(port: int, trusting: ssl.SSLContext, path: str) -> None:
    Recorder.seen.clear()
    assert post(port, trusting, path.encode()) in (400, 403, 404, 405)
    assert not Recorder.seen


PIECES = ["/", "//", "%2F", "%2f", "%252F", "..", "%2e%2e", ".%2E", "./", "\\", "%5C", ";", "%00", "%3F", "?", "#", "&"]
WORDS = ["v2", "%762", "models", "repository", "m", "load", "infer", "index", "trace", "setting", "versions", "1"]
STARTS = ["/v2/models/", "/v2/models/m/", "/v2/models/m/infer", "/v2/health/ready", "/v2/", "/"]


@given(start=st.sampled_from(STARTS), rest=st.lists(st.sampled_from(PIECES + WORDS), max_size=8))
@settings(max_examples=150, deadline=None)
def test_what_reaches_the_server_is_a_plain_path(
    port: int, trusting: ssl.SSLContext, start: str, rest: list[str]
) -> None:
    Recorder.seen.clear()
    post(port, trusting, (start + "".join(rest)).encode())
    for path, _ in Recorder.seen:
        path = path.partition("?")[0]
        assert PLAIN.fullmatch(path), path
        assert unquote(path) == path


def test_the_real_server_answers_behind_it(
    endpoint: Endpoint, certificates: Path, tmp_path: Path, trusting: ssl.SSLContext
) -> None:
    with nginx(tmp_path / "nginx", replace(endpoint), certificates) as port:
        key = f"admin-key: {endpoint.secret}\r\n"
        assert (
            post(port, trusting, f"/v2/models/{TINY}/infer".encode()) == 500
        )  # its own word for a body without inputs
        for path in SPELLED[:12]:
            assert post(port, trusting, path.encode(), key) in (400, 403)
