import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from modelathe.client import connect
from modelathe.errors import ServerAbsent, ServerFault
from serve.config import model_config
from serve.config.errors import BadRepository, ModelRefused, NotInstalled, PortTaken, ServerFailed
from serve.server import control
from serve.server import tritonserver as server
from serve.server.endpoint import Endpoint
from serve.server.options import Listen
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_WEIGHT

ONE = {"x": np.ones((1, 4), np.float32)}


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def group_is_gone(pid: int) -> bool:
    """Whether no process of the server's own process group lives; one that its new parent has yet to reap does not."""
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    processes = [line.split() for line in listed.splitlines()]
    return not [state for group, state in processes if int(group) == pid and not state.startswith("Z")]


def shared_memory(pid: int) -> list[Path]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sorted({Path(line.split()[-1]) for line in lines if "/dev/shm/modelathe-" in line})


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the logs go that a failed server leaves."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


def test_ready_server_serves_the_standard_configuration(endpoint: Endpoint, model_repository: Path) -> None:
    connection = http.client.HTTPConnection(urlsplit(endpoint.http).netloc)
    connection.request("GET", f"/v2/models/{TINY}/config")
    served = json.load(connection.getresponse())
    connection.close()
    written = model_config.parse((model_repository / TINY / "config.pbtxt").read_text())
    assert served["max_batch_size"] == written.max_batch_size == 32
    assert served["version_policy"] == {"specific": {"versions": [1]}}
    assert "dynamic_batching" in served
    assert [group["count"] for group in served["instance_group"]] == [1]
    assert {key: value["string_value"] for key, value in served["parameters"].items()} == {
        "intra_op_thread_count": "1",
        "session.force_spinning_stop": "1",
    }
    assert [sample["batch_size"] for sample in served["model_warmup"]] == [1, 32]


def test_only_loopback_listens(endpoint: Endpoint) -> None:
    ports = {urlsplit(url).port for url in (endpoint.http, endpoint.grpc, endpoint.metrics)}
    assert len(ports) == 3
    sockets = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()
    ]
    listening = [line[1].split(":") for line in sockets if line[3] == "0A"]  # 0A: the state LISTEN
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same in IPv6
    addresses = {address for address, port in listening if int(port, 16) in ports}
    assert addresses
    assert addresses <= loopback


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", f"/v2/repository/models/{TINY}/unload"),
        ("POST", f"/v2/repository/models/{TINY}/load"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("GET", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
    ],
)
def test_http_needs_the_secret(endpoint: Endpoint, method: str, path: str) -> None:
    for headers in ({}, {control.ADMIN_KEY: "guess"}):
        connection = http.client.HTTPConnection(urlsplit(endpoint.http).netloc)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        assert response.status == http.client.FORBIDDEN
        response.read()
        connection.close()


def test_grpc_needs_the_secret(endpoint: Endpoint) -> None:
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(endpoint.grpc.removeprefix("grpc://"))
    for ask in (client.get_model_repository_index, client.get_system_shared_memory_status, client.get_log_settings):
        with pytest.raises(InferenceServerException, match="restricted"):
            ask()
    headers = {f"triton-grpc-protocol-{control.ADMIN_KEY}": endpoint.secret}
    assert [model.name for model in client.get_model_repository_index(headers=headers).models] == [TINY]
    client.close()


def test_secret_stays_out_of_log_and_repr(endpoint: Endpoint) -> None:
    assert endpoint.secret not in endpoint.log.read_text() + repr(endpoint)
    assert len(endpoint.secret) == 64


def test_stop_leaves_nothing(model_repository: Path, server_prefix: Path, logs: Path) -> None:
    with running(model_repository) as endpoint:
        regions = shared_memory(endpoint.pid)
        assert regions
        assert endpoint.log.parent == logs
        assert connect(endpoint.grpc).ready(TINY)
    assert group_is_gone(endpoint.pid)
    assert not [path for path in regions if path.exists()]
    assert not list(logs.iterdir())


def test_second_version_is_what_is_served(place: Path, publish_tiny, server_prefix: Path) -> None:
    publish_tiny(place)
    publish_tiny(place, weight=np.full((4, 3), 2, np.float32))
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        assert client.infer(TINY, ONE)["y"].tolist() == [[8.0, 8.0, 8.0]]
        assert client.ready(TINY, "2")
        assert not client.ready(TINY, "1")


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port"])
def test_taken_port_is_named_before_anything_starts(
    model_repository: Path, server_prefix: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("the server was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(PortTaken, match=f"--{option.replace('_', '-')} {port}") as failure,
            running(model_repository, listen=Listen(**{option: port})),
        ):
            pass
    assert failure.value.exit_code == 5


def test_one_port_for_two_uses_is_refused(model_repository: Path, server_prefix: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    listen = Listen(http_port=port, grpc_port=port)
    with pytest.raises(PortTaken, match="--grpc-port"), running(model_repository, listen=listen):
        pass


def break_file(place: Path) -> str:
    (place / TINY / "1" / "model.onnx").write_bytes(b"no graph")
    return "model.onnx cannot be loaded"


def rename_output(place: Path) -> str:
    config = place / TINY / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "y"', 'name: "other"'))
    return "config.pbtxt has the output other, the model has y"


def widen_input(place: Path) -> str:
    config = place / TINY / "config.pbtxt"
    config.write_text(config.read_text().replace("dims: 4", "dims: 5"))
    return r"the input x has the shape \[-1, 5\] by config.pbtxt and \[-1, 4\] in the model"


def change_type(place: Path) -> str:
    config = place / TINY / "config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_FP32", "TYPE_FP16"))
    return "the input x is TYPE_FP16 in config.pbtxt and TYPE_FP32 in the model"


@pytest.mark.parametrize("damage", [break_file, rename_output, widen_input, change_type])
def test_model_that_does_not_load_is_one_line(place: Path, publish_tiny, server_prefix: Path, damage, tmp_path) -> None:
    (publish_tiny(place).path / "lineage.json").unlink()
    reason = damage(place)
    log = tmp_path / "server.log"
    with (
        pytest.raises(ModelRefused, match=f"model {TINY}, version 1: {reason}") as failure,
        running(place, listen=Listen(log=log)),
    ):
        pass
    assert failure.value.exit_code == 4
    assert "\n" not in failure.value.what
    assert "/" not in failure.value.what
    assert str(log) in failure.value.fix
    pid = int(log.read_text().split()[2])
    assert group_is_gone(pid)


def test_verified_before_it_is_loaded(place: Path, publish_tiny, server_prefix: Path) -> None:
    version = publish_tiny(place)
    break_file(place)
    with pytest.raises(BadRepository, match=r"model\.onnx: changed"), running(place):
        pass
    assert version.path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not a Triton"),
        ("version_policy{specific{versions:9}}", "no version"),
    ],
)
def test_configuration_that_cannot_be_served(place: Path, publish_tiny, server_prefix, text: str, message: str) -> None:
    (publish_tiny(place).path / "lineage.json").unlink()
    config = place / TINY / "config.pbtxt"
    written = config.read_text()
    kept = written[written.index("max_batch_size") :] if text.startswith("version") else ""
    config.write_text(text + "\n" + kept)
    with pytest.raises(BadRepository, match=message), running(place):
        pass


def test_an_empty_configuration_is_completed_from_the_file(place: Path, publish_tiny) -> None:
    (publish_tiny(place).path / "lineage.json").unlink()
    (place / TINY / "config.pbtxt").write_text("")
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        assert [spec.name for spec in client.metadata(TINY)[0]] == ["x"]
        assert client.infer(TINY, ONE)["y"].shape == (1, 3)


def test_absent_environment_is_named(model_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELATHE_SERVER", str(tmp_path / "none"))
    with pytest.raises(NotInstalled, match="serve install"), running(model_repository):
        pass


def test_death_in_the_middle_is_the_servers_error(model_repository: Path, server_prefix: Path) -> None:
    with (
        pytest.raises(ServerFailed, match="killed by SIGKILL") as failure,
        running(model_repository) as endpoint,
        connect(endpoint.grpc) as client,
    ):
        os.kill(endpoint.pid, signal.SIGKILL)
        eventually(lambda: not control.is_ready(endpoint.http))
        client.infer(TINY, ONE)
    assert isinstance(failure.value.__cause__, ServerAbsent | ServerFault)
    assert eventually(lambda: group_is_gone(endpoint.pid))
    assert endpoint.log.exists()


@pytest.fixture
def dying(server_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Path]:
    """A function that makes the next starts of a server end by SIGABRT; its file gets a letter for every start."""
    starts, launch = tmp_path / "starts", tmp_path / "launch.py"

    def stage(deaths: int, last_words: str) -> Path:
        starts.write_text("")
        launch.write_text(
            "import os, pathlib, runpy, sys\n"
            f"starts = pathlib.Path({str(starts)!r})\n"
            "starts.write_text(starts.read_text() + 's')\n"
            f"if len(starts.read_text()) <= {deaths}:\n"
            f"    print({last_words!r}, file=sys.stderr)\n"
            "    os.abort()\n"
            f"runpy.run_path({str(server.LAUNCH)!r}, run_name='__main__')\n"
        )
        monkeypatch.setattr(server, "LAUNCH", launch)
        return starts

    return stage


def test_a_server_that_lost_a_lock_is_started_again(
    dying: Callable[[int, str], Path], model_repository: Path, logs: Path
) -> None:
    starts = dying(server.STARTS - 1, server.LOST_LOCK)
    with running(model_repository, grace=0) as endpoint, connect(endpoint.grpc) as client:
        np.testing.assert_allclose(client.infer(TINY, ONE)["y"], ONE["x"] @ TINY_WEIGHT, rtol=1e-5)
    assert len(starts.read_text()) == server.STARTS
    assert not list(logs.iterdir())


@pytest.mark.parametrize(("last_words", "tries"), [(server.LOST_LOCK, server.STARTS), ("out of memory", 1)])
def test_a_server_that_dies_for_good(
    dying: Callable[[int, str], Path], model_repository: Path, last_words: str, tries: int
) -> None:
    starts = dying(99, last_words)
    with pytest.raises(ServerFailed, match="killed by SIGABRT"), running(model_repository):
        pass
    assert len(starts.read_text()) == tries


@pytest.mark.parametrize(
    ("last_words", "told"),
    [
        ("E1 1 a.cc:1] \"failed to load 'tiny' version 1: Internal: no step\"", "model tiny, version 1: no step"),
        ("I1 1 pb_stub.cc:1]  Failed to initialize Python stub: no step\n\nAt:\n  model.py(5)", "no step"),
    ],
)
def test_a_crash_after_a_load_that_failed_is_told_as_that(
    dying: Callable[[int, str], Path], model_repository: Path, last_words: str, told: str
) -> None:
    dying(99, last_words)
    with pytest.raises(ModelRefused) as failure, running(model_repository):
        pass
    assert failure.value.what == told


@pytest.mark.parametrize(
    ("end", "told"), [(signal.SIGSEGV, "killed by SIGSEGV"), (signal.SIGTERM, "by itself with exit")]
)
def test_the_end_of_a_server_that_was_ready_is_not_an_earlier_load_that_failed(
    model_repository: Path, server_prefix: Path, tmp_path: Path, end: signal.Signals, told: str
) -> None:
    place = tmp_path / "model_repository"
    shutil.copytree(model_repository, place)
    with pytest.raises(ServerFailed, match=told), running(place) as endpoint:
        (place / TINY / "1" / "model.onnx").write_bytes(b"no graph")
        with pytest.raises(ModelRefused, match="cannot be loaded"):
            control.load(endpoint.http, endpoint.secret, TINY)
        os.kill(endpoint.pid, end)
        server.wait(endpoint)


def test_server_ends_with_a_parent_that_is_killed(model_repository: Path, server_prefix: Path, logs: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from serve.server.tritonserver import Listen, running\n"
        "with running(Path(sys.argv[1]), listen=Listen(log=Path(sys.argv[2]))) as endpoint:\n"
        "    print(endpoint.pid, flush=True); time.sleep(600)"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", code, str(model_repository), str(logs / "log")]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        regions = shared_memory(pid)
        assert regions
        parent.kill()
    assert eventually(lambda: group_is_gone(pid))
    assert not [path for path in regions if path.exists()]


def test_memory_of_servers_that_are_gone_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    with subprocess.Popen(["true"]) as gone:
        pass
    rest = "0123456789abcdef-region"
    names = [
        f"modelathe-{gone.pid}-{rest}",
        f"modelathe-{gone.pid}-{rest}-young",
        f"modelathe-{os.getpid()}-{rest}",
        "modelathe-mine",
    ]
    for name in names:
        (memory / name).touch()
        if "young" not in name:
            os.utime(memory / name, (0, 0))
    monkeypatch.setattr(server, "SHARED_MEMORY", memory)
    server._sweep_shared_memory()
    assert sorted(path.name for path in memory.iterdir()) == sorted(names[1:])


def test_ports_are_free_and_different() -> None:
    ports = server._ports(Listen())
    assert len(set(ports)) == 3
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ports[0])) == errno.ECONNREFUSED
