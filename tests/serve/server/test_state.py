"""Which server runs for a repository, whatever that is called; and a load that takes longer than anybody waits."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtest.plan import served
from modelathe.errors import MachineError
from serve.cli import main
from serve.config.errors import NoAnswer, ServerFailed, StillLoading
from serve.repository import scratch
from serve.repository import tree as repository
from serve.rollout import promotion, rollout
from serve.server import control, state
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.conftest import TINY
from tests.serve.commands.test_up import ROOT, serve
from tests.serve.pipelines.test_image_models import publish as publish_image
from tests.serve.rollout.test_rollout import Publish
from tests.serve.server.test_server import eventually

NOBODY = Endpoint("http://127.0.0.1:9", "grpc://127.0.0.1:9", "", 1, Path("/dev/null"), (TINY,), "secret")


@pytest.fixture
def place(tmp_path: Path, publish_tiny: Publish, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    publish_tiny(tmp_path / "model_repository")
    publish_tiny(tmp_path / "model_repository")
    return tmp_path / "model_repository"


def spellings(place: Path) -> list[Path]:
    link, inner = place.parent / "link", place.parent / "linked"
    link.symlink_to(place)
    inner.symlink_to(place.parent)
    return [place, place / ".." / place.name, link, inner / place.name, Path(os.path.relpath(place))]


def test_a_server_is_found_by_any_path(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.control, "is_live", lambda url: True)
    paths = spellings(place)
    with state.claimed(paths[2]) as ready:
        ready(NOBODY)
        assert [state.serving(path) for path in paths] == [NOBODY] * len(paths)
        assert [running.condition for running in state.everything()] == ["live"]
        for path in paths:
            with pytest.raises(MachineError, match="is served already"), state.claimed(path):
                pass
        assert state.serving(place.parent) is None
    assert [state.serving(path) for path in paths] == [None] * len(paths)
    with state.claimed(place):
        pass


@pytest.mark.parametrize(("condition", "words"), [("starting", "is being started"), ("silent", "does not answer")])
def test_a_server_that_cannot_be_asked_is_not_none(place: Path, condition: str, words: str) -> None:
    """The disk would change without the server."""
    before = (place / TINY / repository.CONFIG).read_text()
    with state.claimed(place) as ready:
        if condition == "silent":
            ready(NOBODY)
        assert [running.condition for running in state.everything()] == [condition]
        for verb in (("promote", TINY, "1"), ("remove", TINY, "--all")):
            done = serve(*verb, "--repository", str(place))
            assert (done.returncode, words in done.stderr) == (5, True), done.stderr
        second = serve("up", str(place))
        assert (second.returncode, words in second.stderr) == (5, True), second.stderr
        told = serve("status", "--json")
        assert told.returncode == 5
        assert [server["state"] for server in json.loads(told.stdout)["servers"]] == [condition]
    assert (place / TINY / repository.CONFIG).read_text() == before


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("load", ("promote", TINY, "1")),
        ("load", ("rollback", TINY)),
        ("load", ("add", f"model_repository/{TINY}/1", "--name", "new", "--no-check")),
        ("load", ("pipeline", "image", "planes", "--no-check")),
        ("unload", ("remove", TINY, "--all")),
    ],
)
def test_a_server_that_begins_before_a_commands_lock_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, order: str, words: tuple[str, ...]
) -> None:
    """Whether one runs is decided under the lock."""
    told: list[str] = []
    monkeypatch.setattr(control, order, lambda url, *more: told.append(url))
    monkeypatch.setattr(control, "is_live", lambda url: True)
    monkeypatch.setattr(control, "versions", lambda url, model: [])
    publish_image(place, place.parent / "planes.onnx", "planes")
    with ExitStack() as stack:
        real = scratch.locked

        def late(folder: Path) -> AbstractContextManager[None]:
            if not state.everything():
                stack.enter_context(state.claimed(place))(NOBODY)
            return real(folder)

        monkeypatch.setattr(scratch, "locked", late)
        monkeypatch.chdir(place.parent)
        done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert set(told) == {NOBODY.http}
    assert json.loads(done.stdout).get("url", NOBODY.http) == NOBODY.http


def test_no_server_begins_beside_a_command_that_found_none(place: Path) -> None:
    with promotion.alone(place, [TINY]), pytest.raises(MachineError, match="another command works in this folder"):
        promotion.settle(place)


def test_what_a_killed_command_left_counts_not(place: Path) -> None:
    code = "import sys, time; from pathlib import Path; from serve.server import state\n"
    code += "with state.claimed(Path(sys.argv[1])):\n print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(place)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert [running.owner for running in state.everything()] == [process.pid]
        process.send_signal(signal.SIGKILL)
    assert len(list(served.folder().glob("server-*"))) == 1
    assert state.everything() == []
    # Its number may be given to another process.
    (left,) = served.folder().glob("server-*")
    left.write_text(json.dumps(json.loads(left.read_text()) | {"owner": os.getpid()}))
    assert state.everything() == []
    assert state.serving(place) is None
    with state.claimed(place):
        pass


SLOW = """
import time
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        time.sleep({seconds})
        {then}

    def execute(self, requests):
        return [pb.InferenceResponse(error=pb.TritonError("it only loads")) for _ in requests]
"""
CONFIG = """name: "slow"
backend: "python"
input {{ name: "x" data_type: TYPE_FP32 dims: [1] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [1] }}
version_policy {{ specific {{ versions: [{number}] }} }}
instance_group {{ kind: KIND_CPU }}
"""


def lay_out_slow(place: Path, number: int, seconds: float, then: str = "pass") -> None:
    folder = place / "slow" / str(number)
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(SLOW.format(seconds=seconds, then=then))
    config = CONFIG.format(number=number)
    path = place / "slow" / repository.CONFIG
    kept = path.read_text() if path.exists() else config
    path.write_text(config)
    digests = {name: repository.digest(file) for name, file in (("model.py", folder / "model.py"), (path.name, path))}
    path.write_text(kept)
    (folder / repository.LINEAGE).write_text(json.dumps({"config": config, "digests": digests, "lived": []}))


def states(place: Path) -> dict[int, str]:
    return {standing.number: standing.state for standing in rollout.standings(place, "slow")}


def test_a_load_that_takes_longer_is_neither_failed_nor_forgotten(tmp_path: Path, server_prefix: Path) -> None:
    place = tmp_path / "model_repository"
    lay_out_slow(place, 1, 0)
    lay_out_slow(place, 2, 4)
    lay_out_slow(place, 3, 4, "raise ValueError('not this one')")
    with running(place, grace=0) as endpoint:
        for number, last in ((2, "live"), (3, "failed")):
            with pytest.raises(StillLoading, match=f"version {number} is not loaded after 0.5 s"):
                rollout.promote(place, "slow", number, endpoint, 0.5)
            assert states(place)[number] == "loading"
            with pytest.raises(StillLoading, match="still loading"):
                rollout.roll_back(place, "slow", endpoint)
            done = time.monotonic() + 60
            while time.monotonic() < done:
                try:
                    with promotion.alone(place, ["slow"], endpoint):
                        break
                except StillLoading:
                    time.sleep(0.2)
            assert states(place)[number] == last
            assert rollout.serving(place, "slow", endpoint) == [2] == repository.live(place, "slow")
        assert rollout.before(place, "slow") == 1
        assert "not this one" in repository.read_lineage(place, "slow", 3)["failed"]["why"]
        assert rollout.roll_back(place, "slow", endpoint).number == 1
        assert eventually(lambda: rollout.serving(place, "slow", endpoint) == [1])
    assert not list(place.glob(f"*/{promotion.JOURNAL}"))


def test_a_server_that_starts_takes_back_what_was_left(place: Path) -> None:
    """Killed between the change on disk and the server."""
    code = "import os, sys; from pathlib import Path; from serve.rollout import promotion, rollout\n"
    code += "promotion._finish = lambda journal: os.kill(os.getpid(), 9)\n"
    code += "rollout.promote(Path(sys.argv[1]), 'tiny', 1)"
    killed = subprocess.run([sys.executable, "-c", code, str(place)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    listed = json.loads(serve("list", "--repository", str(place), "--json").stdout)["models"][0]["versions"]
    assert [version["state"] for version in listed] == ["loading", "previous"]
    promotion.settle(place)
    assert [standing.state for standing in rollout.standings(place, TINY)] == ["previous", "live"]
    assert rollout.before(place, TINY) == 1


def test_without_an_answer_nothing_begins(place: Path) -> None:
    with pytest.raises(ServerFailed, match="cannot be asked"):
        rollout.promote(place, TINY, 1, NOBODY)
    assert repository.live(place, TINY) == [2]
    assert not promotion.journals(place)


def test_a_server_that_dies_meanwhile_leaves_the_journal_to_the_next_command(
    tmp_path: Path, server_prefix: Path
) -> None:
    """Of a version that the server never judged nothing says that it failed."""
    place = tmp_path / "model_repository"
    lay_out_slow(place, 1, 0)
    lay_out_slow(place, 2, 0, "import os; os.kill(os.getppid(), 9); time.sleep(60)")
    with running(place, grace=0) as endpoint, pytest.raises(NoAnswer, match="went away while it loaded version 2"):
        rollout.promote(place, "slow", 2, endpoint)
    assert len(promotion.journals(place)) == 1
    assert states(place)[2] == "loading"
    promotion.settle(place)
    assert (states(place)[2], repository.live(place, "slow")) == ("staged", [1])
    assert not promotion.journals(place)
