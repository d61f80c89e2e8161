"""What several rooms' tests share: the installed server, and one tiny model behind a real endpoint."""

import contextlib
import fcntl
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from loadtest.judge import validity
from modelathe.tensors import BATCH, TensorSpec
from optimize.judge import ruler
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server.endpoint import Endpoint
from serve.server.install import install
from serve.server.tritonserver import running
from tests.optimize import hurried

os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""The environment is active, as a user's is: `optimize`, `serve` and `loadtest` are found by their names."""

MOST_RERUNS = 5
"""Second and third tries of `timed` tests that one run of the suite may need in all."""

TINY = "tiny"
TINY_WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
TINY_INPUTS = (TensorSpec("x", "float32", (BATCH, 4)),)
TINY_OUTPUTS = (TensorSpec("y", "float32", (BATCH, 3)),)


def save_tiny(path: Path, weight: np.ndarray = TINY_WEIGHT) -> Path:
    """Write the ONNX model y = x · weight with a free batch axis."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@functools.cache
def lacks_gpu() -> str:
    from optimize.machine import doctor

    return doctor.lacks_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try a test that is marked `timed` three times at most; each failure is listed as a rerun."""
    for item in items:
        if item.get_closest_marker("timed"):
            item.add_marker(pytest.mark.flaky(reruns=2, reruns_delay=5))


@contextlib.contextmanager
def turn(place: Path, alone: bool) -> Iterator[None]:
    """Run in turn with the suite's other processes: beside all that do not ask to be alone, or alone.

    Who waits to be alone holds the door, so that nobody else comes in before.
    """
    with (place / "door").open("w") as door, (place / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run what measures time while no other process of the suite runs a test."""
    with turn(item.config.cache.mkdir("turns"), alone=item.get_closest_marker("timed") is not None):
        return (yield)


def reruns(terminal: pytest.TerminalReporter) -> int:
    return len(terminal.stats.get("rerun", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the whole run above MOST_RERUNS: a race that a second try hides shows in their number."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal and reruns(terminal) > MOST_RERUNS and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (count := reruns(terminalreporter)) > MOST_RERUNS:
        terminalreporter.write_line(
            f"FAILED: {count} reruns, {MOST_RERUNS} are allowed in one run of the tests", red=True
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where a session gets none, with the reason."""
    if item.get_closest_marker("gpu") and (why := lacks_gpu()):
        pytest.skip(f"not run: {why}")


@pytest.fixture
def no_gpu() -> None:
    if not lacks_gpu():
        pytest.skip("there is a GPU")


@pytest.fixture(scope="session")
def gpu_server(server_prefix: Path) -> Path:
    """The same environment with onnxruntime's CUDA provider, which every other test can use too."""
    return install(gpu=True)


@pytest.fixture(scope="session")
def server_prefix() -> Path:
    """The server's environment, installed on a fresh machine."""
    return install()


@pytest.fixture(scope="session")
def openvino_server(server_prefix: Path) -> Path:
    """The same environment with openvino in it."""
    return install(openvino=True)


@pytest.fixture(scope="session")
def publish_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., staging.Version]:
    """A function that publishes y = x · weight to a repository as its next version, which lives from then on."""

    def publish(place: Path, model: str = TINY, weight: np.ndarray = TINY_WEIGHT) -> staging.Version:
        onnx = save_tiny(tmp_path_factory.mktemp("onnx") / "tiny.onnx", weight)
        with staging.stage(place, model, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
            version = staging.publish(staged, {"made_by": "a test"})
        rollout.promote(place, model)
        return version

    return publish


@pytest.fixture(scope="session")
def model_repository(tmp_path_factory: pytest.TempPathFactory, publish_tiny: Callable[..., staging.Version]) -> Path:
    """A repository with the one model `tiny`: x [batch, 4] → y [batch, 3], float32, y = x · TINY_WEIGHT."""
    place = tmp_path_factory.mktemp("served") / "model_repository"
    publish_tiny(place)
    return place


@pytest.fixture(scope="session")
def endpoint(server_prefix: Path, model_repository: Path) -> Iterator[Endpoint]:
    """A real server over `model_repository`, shared by all tests; a test that breaks a server starts its own."""
    with running(model_repository, grace=0) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def each_step_faster() -> Iterator[None]:
    """Let every file be a tenth faster than the one before, for tests of what a run does with speeds.

    Files are opened and timed all the same. How far models as small as the tests' differ in truth, and on a machine
    that is busy, is not theirs to say; nor is whether that machine leaves a client time.
    """

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ruler, "alternate", ruler.alternate)
        patch.setattr(validity, "LARGEST_LAG_MS", validity.LARGEST_LAG_MS)
        hurried.decided()
        yield


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server on 127.0.0.1 and for a client."""
    place = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj")
    openssl(*new, "/CN=authority", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.crt")
    (place / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl(*new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.crt")
    return place
