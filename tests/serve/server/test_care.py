"""A server's life and what stands before it: detach, status, down, TLS, the proxy, the container's command."""

import http.client
import http.server
import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from modelathe.client import connect
from modelathe.errors import UsageError
from serve.config.errors import BadRepository
from serve.repository import tree as repository
from serve.server import container, options, proxy
from serve.server.endpoint import Endpoint
from serve.server.options import Listen, Tls
from serve.server.tritonserver import running
from serve.watch.healing import watching
from tests.conftest import TINY
from tests.serve.commands.test_up import FREE, serve
from tests.serve.server.test_server import eventually, group_is_gone

X = np.ones((2, 4), np.float32)
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


@pytest.mark.timed
def test_a_detached_server_is_seen_and_stopped(model_repository: Path, server_prefix: Path, tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    assert serve("status", env=env).returncode == 5
    started = serve("up", str(model_repository), *FREE, "--detach", "--json", env=env)
    assert started.returncode == 0, started.stderr
    ready = json.loads(started.stdout)
    try:
        with connect(ready["grpc"]) as client:
            assert client.infer(TINY, {"x": X})["y"].shape == (2, 3)
        seen = json.loads(serve("status", "--json", env=env).stdout)["servers"]
        assert [server["http"] for server in seen] == [ready["http"]]
        assert seen[0]["models"] == [{"name": TINY, "versions": [1], "health": "answers"}]
        assert f"  {TINY} 1  answers\n" in serve("status", env=env).stdout
        assert serve("down", "--http-port", "1", env=env).returncode == 5
        for more in ((), ("--detach",)):
            second = serve("up", str(model_repository), *FREE, *more, env=env)
            assert (second.returncode, "is served already" in second.stderr) == (5, True), second.stderr
    finally:
        stopped = serve("down", env=env)
    assert (stopped.returncode, stopped.stdout) == (0, f"stopped: {ready['http']}\n"), stopped.stderr
    assert eventually(lambda: group_is_gone(ready["pid"]))
    assert serve("down", env=env).returncode == 5
    # The next one sweeps what this one logged.
    left = {path.suffix for path in (tmp_path / "modelathe").iterdir()}
    assert left <= {".log", ".up"}


@pytest.mark.timed
def test_status_tells_a_dead_backend_from_a_ready_server(
    model_repository: Path, server_prefix: Path, tmp_path: Path
) -> None:
    import os
    import signal

    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    ready = json.loads(serve("up", str(model_repository), *FREE, "--detach", "--no-probe", "--json", env=env).stdout)
    try:
        children = Path(f"/proc/{ready['pid']}/task/{ready['pid']}/children").read_text().split()
        stubs = [pid for pid in children if b"stub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert stubs
        for pid in stubs:
            os.kill(int(pid), signal.SIGKILL)
        told = serve("status", env=env)
        assert told.returncode == 5
        assert "is not healthy" in told.stdout
    finally:
        assert serve("down", env=env).returncode == 0


def test_a_detached_server_that_does_not_start_says_why(tmp_path: Path, server_prefix: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = serve("up", str(tmp_path / "none"), *FREE, "--detach", env=env)
    assert done.returncode == 4
    assert "does not exist" in done.stderr
    assert not list((tmp_path / "modelathe").iterdir())


@contextmanager
def channel(endpoint: Endpoint, **files: str) -> Iterator[object]:
    import tritonclient.grpc as library

    client = library.InferenceServerClient(endpoint.grpc.removeprefix("grpc://"), ssl=bool(files), **files)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.parametrize("mutual", [False, True])
def test_grpc_is_encrypted(model_repository: Path, server_prefix: Path, certificates: Path, mutual: bool) -> None:
    from tritonclient.utils import InferenceServerException

    authority, ours = certificates / "ca.crt", {"private_key": "client.key", "certificate_chain": "client.crt"}
    tls = Tls(certificates / "server.crt", certificates / "server.key", authority if mutual else None)
    own = {key: str(certificates / name) for key, name in ours.items()}
    with (
        running(model_repository, listen=Listen(tls=tls), grace=0) as endpoint,
        watching(endpoint, model_repository),
    ):
        with channel(endpoint, root_certificates=str(authority), **(own if mutual else {})) as client:
            assert client.is_model_ready(TINY)
        with channel(endpoint) as client, pytest.raises(InferenceServerException):
            client.is_model_ready(TINY, client_timeout=5)
        if mutual:
            with channel(endpoint, root_certificates=str(authority)) as client, pytest.raises(InferenceServerException):
                client.is_model_ready(TINY, client_timeout=5)
        # The probe, and what else speaks from here, goes by HTTP.
        with connect(endpoint.plain) as client:
            assert client.infer(TINY, {"x": X})["y"].shape == (2, 3)


def test_nothing_is_opened_beyond_loopback_by_accident(model_repository: Path) -> None:
    refused = serve("up", str(model_repository), "--host", "0.0.0.0")
    assert refused.returncode == 2
    assert re.search(r"opens a server with [1-9]\d known CVEs to others", refused.stderr)
    assert "--accept-open-cves" in refused.stderr
    assert Listen(host="0.0.0.0", exposed=True).reached("http") == "127.0.0.1"
    assert Listen(host="127.0.0.2").reached("http") == "127.0.0.2"
    for host in ("everywhere", "::1"):
        with pytest.raises(UsageError, match="is no IPv4 address"):
            Listen(host=host)


def test_an_exposed_server_answers_where_it_listens(model_repository: Path, server_prefix: Path) -> None:
    with running(model_repository, listen=Listen(host="127.0.0.3", log_level="error"), grace=0) as endpoint:
        assert urlsplit(endpoint.http).hostname == "127.0.0.3"
        with connect(endpoint.http) as client:
            assert client.infer(TINY, {"x": X})["y"].shape == (2, 3)
        assert '"HTTP' not in endpoint.log.read_text()


def listening(port: int) -> set[str]:
    """The addresses at which something listens on the port."""
    found = psutil.net_connections(kind="tcp")
    return {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == port}


@pytest.mark.parametrize("mutual", [False, True])
def test_with_tls_nothing_is_left_open_in_the_clear(
    model_repository: Path, server_prefix: Path, certificates: Path, mutual: bool
) -> None:
    tls = Tls(certificates / "server.crt", certificates / "server.key", certificates / "ca.crt" if mutual else None)
    listen = Listen(host="0.0.0.0", tls=tls, exposed=True)
    with running(model_repository, listen=listen, grace=0) as endpoint:
        assert listening(urlsplit(endpoint.grpc).port or 0) <= {"0.0.0.0", "::"}
        for url in (endpoint.http, endpoint.metrics):
            assert {place.removeprefix("::ffff:") for place in listening(urlsplit(url).port or 0)} == {"127.0.0.1"}
        with connect(endpoint.plain) as client:
            assert client.infer(TINY, {"x": X})["y"].shape == (2, 3)
    published = [part for part in container.command(model_repository, "26.07", listen) if "--publish" in part]
    assert published == [
        "--publish=127.0.0.1:8000:8000",
        "--publish=0.0.0.0:8001:8001",
        "--publish=127.0.0.1:8002:8002",
    ]


def test_tls_wants_its_files(tmp_path: Path, model_repository: Path, certificates: Path) -> None:
    with pytest.raises(BadRepository, match="there is no such file"):
        Tls(tmp_path / "a", tmp_path / "b").options()
    assert serve("up", str(model_repository), "--tls-cert", "a").returncode == 2
    certificate, key, other = (certificates / name for name in ("server.crt", "server.key", "client.key"))
    for wrong in ((key, certificate), (certificate, other), (certificate, certificate)):
        with pytest.raises(BadRepository, match="are no certificate and its key"):
            Tls(*wrong).options()
    assert "--grpc-use-ssl=true" in Tls(certificate, key).options()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx(
    folder: Path, endpoint: Endpoint, certificates: Path, clients: Path | None = None, **more: object
) -> Iterator[int]:
    port = free_port()
    tls = Tls(certificates / "server.crt", certificates / "server.key", clients)
    proxy.write(folder, endpoint.http, f"127.0.0.1:{port}", tls, **more)  # type: ignore[arg-type]
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf"]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: listens(port))
        yield port
    finally:
        process.terminate()
        process.wait(20)


def ask(port: int, authority: Path, path: str, body: object = None, own: tuple[Path, Path] | None = None) -> int:
    context = ssl.create_default_context(cafile=str(authority))
    if own:
        context.load_cert_chain(*own)
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    try:
        connection.request("POST" if body is not None else "GET", path, body=body, encode_chunked=False)  # type: ignore[arg-type]
        return connection.getresponse().status
    finally:
        connection.close()


class Waiting(http.server.BaseHTTPRequestHandler):
    """An overloaded server: it answers nothing until `full` is set."""

    full = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.full.wait(30)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.timed
@needs_nginx
def test_the_proxy_passes_on_no_more_at_once_than_the_server_can_answer(
    endpoint: Endpoint, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 512)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Waiting) as behind, ThreadPoolExecutor(300) as pool:
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        overloaded = replace(endpoint, http=f"http://127.0.0.1:{behind.server_port}")
        with nginx(tmp_path / "nginx", overloaded, certificates) as port:
            paths = ["/v2/models/x/infer"] * 300
            answers = [pool.submit(ask, port, certificates / "ca.crt", path, "{}") for path in paths]
            refused = 300 - proxy.MOST_IN_FLIGHT
            assert eventually(lambda: sum(answer.done() for answer in answers) == refused)
            assert {answer.result() for answer in answers if answer.done()} == {502}
            Waiting.full.set()
            assert Counter(answer.result() for answer in answers) == {200: proxy.MOST_IN_FLIGHT, 502: refused}
        behind.shutdown()


@needs_nginx
def test_the_proxy_encrypts_limits_and_closes(endpoint: Endpoint, certificates: Path, tmp_path: Path) -> None:
    authority = certificates / "ca.crt"
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
    with nginx(tmp_path / "nginx", endpoint, certificates, limit="100k") as port:
        assert ask(port, authority, f"/v2/models/{TINY}/infer", body) == 200
        assert ask(port, authority, "/v2/health/ready") == 200
        assert ask(port, authority, "/v2") == 200
        assert ask(port, authority, f"/v2/models/{TINY}/infer", "x" * 200_000) == 413
        for path in ("/v2/repository/index", f"/v2/repository/models/{TINY}/unload", "/v2/systemsharedmemory/status"):
            assert ask(port, authority, path, "{}") == 403
        assert ask(port, authority, "/v2/trace/setting") == 403
        assert ask(port, authority, "/metrics") == 403
        # A flood of one-byte chunks reaches tritonserver as one body, or not at all.
        chunks = (b"1" for _ in range(50_000))
        context = ssl.create_default_context(cafile=str(authority))
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
        connection.request("POST", f"/v2/models/{TINY}/infer", body=chunks, encode_chunked=True)
        assert connection.getresponse().status in (400, 413, 500)
        connection.close()
        assert ask(port, authority, f"/v2/models/{TINY}/infer", body) == 200
        # nginx answers a client that speaks without TLS itself.
        plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        plain.request("GET", "/v2/health/ready")
        assert plain.getresponse().status == 400
        plain.close()


@needs_nginx
def test_the_proxy_asks_clients_for_certificates(endpoint: Endpoint, certificates: Path, tmp_path: Path) -> None:
    authority = certificates / "ca.crt"
    with nginx(tmp_path / "a folder", endpoint, certificates, clients=authority) as port:
        own = (certificates / "client.crt", certificates / "client.key")
        assert ask(port, authority, "/v2/health/ready", own=own) == 200
        assert ask(port, authority, "/v2/health/ready") == 400


def test_the_proxy_command(tmp_path: Path, certificates: Path) -> None:
    files = ("--tls-cert", str(certificates / "server.crt"), "--tls-key", str(certificates / "server.key"))
    done = serve("proxy", str(tmp_path / "nginx"), *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"written: {tmp_path / 'nginx' / 'nginx.conf'}\n")
    for wrong in (("--listen", "a b"), ("--body-limit", "much"), ("--url", "grpc://127.0.0.1:1")):
        assert serve("proxy", str(tmp_path / "nginx"), *files, *wrong).returncode == 2
    missing = ("--tls-cert", "none", "--tls-key", "none")
    assert serve("proxy", str(tmp_path / "nginx"), *missing).returncode == 4


def test_the_containers_command(model_repository: Path, certificates: Path) -> None:
    done = serve("up", str(model_repository), "--container", "26.07", "--print")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert command[:4] == ["docker", "run", "--rm", "--init"]
    assert "--publish=127.0.0.1:8000:8000" in command
    assert f"--volume={model_repository}:/models:ro" in command
    assert "nvcr.io/nvidia/tritonserver:26.07-py3" in command
    assert f"--load-model={TINY}" in command
    assert "--disable-auto-complete-config" in command
    assert not any("gpus" in option for option in command)
    assert not any("shm=true" in option for option in command)
    tls = Tls(certificates / "server.crt", certificates / "server.key")
    command = container.command(model_repository, "26.07", Listen(tls=tls, http_port=9000))
    assert "--publish=127.0.0.1:9000:8000" in command
    assert "--grpc-server-cert=/certificates/server.crt" in command
    assert f"--volume={certificates}/server.key:/certificates/server.key:ro" in command
    # What --host warns of are the holes of the release.
    holes = serve("up", str(model_repository), "--container", "26.05", "--print", "--host", "0.0.0.0")
    assert (holes.returncode, "a server with 5 known CVEs" in holes.stderr) == (2, True), holes.stderr
    everywhere = serve("up", str(model_repository), "--container", "26.07", "--print", "--host", "0.0.0.0")
    assert "--publish=0.0.0.0:8000:8000" in shlex.split(everywhere.stdout), everywhere.stderr
    assert serve("up", str(model_repository), "--container", "26.07", "--print", "--detach").returncode == 2
    assert serve("up", str(model_repository), "--container", "latest", "--print").returncode == 2
    assert serve("up", str(model_repository), "--print").returncode == 2


def test_options_follow_the_configurations() -> None:
    place = Path("model_repository")
    configs = {name: repository.config(place, name) for name in repository.models(place)}
    told = options.common(configs, "secret", Listen(log_level="verbose"))
    assert "--log-verbose=1" in told
    assert "--metrics-config=summary_latencies=true" in told
    assert not [option for option in told if "rate-limit" in option]
    assert options.cache(configs, None) == []
