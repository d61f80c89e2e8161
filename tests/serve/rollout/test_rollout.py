"""Versions: which is live, changing that under load on a real server, and what may not be."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelathe.client import connect
from modelathe.errors import ModelMissing
from serve.config.errors import BadRepository, ModelRefused
from serve.repository import staging
from serve.repository import tree as repository
from serve.rollout import rollout
from serve.server import control
from serve.server.endpoint import Endpoint
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_WEIGHT, save_tiny
from tests.serve.commands.test_up import serve, up
from tests.serve.server.test_server import eventually
from tests.serve.watch.test_probe import backend_processes

ONE = np.ones((1, 4), np.float32)
Publish = Callable[..., staging.Version]


@pytest.fixture
def place(tmp_path: Path, publish_tiny: Publish) -> Path:
    """A repository with two versions of `tiny`, the second of twice the weight."""
    place = tmp_path / "model_repository"
    publish_tiny(place)
    publish_tiny(place, weight=2 * TINY_WEIGHT)
    return place


def states(place: Path) -> dict[int, str]:
    return {standing.number: standing.state for standing in rollout.standings(place, TINY)}


def answer(endpoint: Endpoint) -> np.ndarray:
    with connect(endpoint.grpc) as client:
        return client.infer(TINY, {"x": ONE})["y"]


def reconfigure(place: Path, number: int) -> None:
    """Give a version another configuration than the others, digest included, as another target would."""
    path = place / TINY / str(number) / repository.LINEAGE
    lineage = json.loads(path.read_text())
    lineage["config"] += 'parameters { key: "note" value { string_value: "another" } }\n'
    lineage["digests"][repository.CONFIG] = hashlib.sha256(lineage["config"].encode()).hexdigest()
    path.write_text(json.dumps(lineage))


def test_promote_and_roll_back_on_disk(place: Path, publish_tiny: Publish) -> None:
    assert states(place) == {1: "previous", 2: "live"}
    publish_tiny(place, weight=3 * TINY_WEIGHT)
    assert states(place) == {1: "previous", 2: "previous", 3: "live"}
    assert rollout.before(place, TINY) == 2
    rollout.promote(place, TINY, 1)
    assert states(place) == {1: "live", 2: "previous", 3: "previous"}
    assert rollout.before(place, TINY) == 3
    repository.verify(place)
    assert sorted(path.name for path in (place / TINY).iterdir()) == ["1", "2", "3", "config.pbtxt"]


def test_remove_spares_what_is_live_and_its_predecessor(place: Path, publish_tiny: Publish) -> None:
    for factor in (3, 4, 5):
        publish_tiny(place, weight=factor * TINY_WEIGHT)
    rollout.promote(place, TINY, 2)
    assert rollout.remove(place, TINY, keep=1) == [1, 3, 4]
    assert states(place) == {2: "live", 5: "previous"}
    assert rollout.remove(place, TINY, keep=1) == []
    assert sorted(path.name for path in (place / TINY).iterdir()) == ["2", "5", "config.pbtxt"]


def test_why_tells_steps_and_gates_of_the_committed_model() -> None:
    said = serve("why", "digits_cnn").stdout.splitlines()
    assert "  workload: examples/digits_cnn.py:workload" in said
    assert any(line.startswith("  done, with accuracy after each step: prune.channels 0.3") for line in said)
    assert any(line.startswith("  gates: 8 of 8 passed") for line in said)
    assert not any("{" in line for line in said)
    assert len(said) < 15


def test_why_tells_of_any_version_and_opens_no_page_that_is_not_there(place: Path) -> None:
    at = ("--repository", str(place))
    assert "version 1: previous, last live since " in serve("why", TINY, "1", *at).stdout
    told = json.loads(serve("why", TINY, "2", *at, "--json").stdout)
    assert [version["number"] for version in told["versions"]] == [2] and told["pages"] == {}
    assert serve("why", TINY, "7", *at).returncode == 4
    opened = serve("why", TINY, "1", *at, "--open")
    assert opened.returncode == 4
    assert "has no page" in opened.stderr


def test_the_newest_is_promoted_unless_one_is_named(place: Path, tmp_path: Path) -> None:
    assert rollout.promote(place, TINY, 1).number == 1
    assert rollout.promote(place, TINY).number == 2
    empty = tmp_path / "empty"
    (empty / TINY).mkdir(parents=True)
    (empty / TINY / "config.pbtxt").write_text((place / TINY / "config.pbtxt").read_text())
    with pytest.raises(BadRepository, match="there is no version 1") as raised:
        rollout.promote(empty, TINY)
    assert raised.value.fix == "publish one with: optimize run"


def test_what_cannot_be_promoted(place: Path) -> None:
    before = (place / TINY / "config.pbtxt").read_bytes()
    with pytest.raises(BadRepository, match="no version 7"):
        rollout.promote(place, TINY, 7)
    with pytest.raises(BadRepository, match="holds no model nope"):
        rollout.standings(place, "nope")
    with pytest.raises(BadRepository, match="holds no model nope"):
        rollout.remove(place, "nope", keep=1)
    shown = serve("show", TINY, "7", "--repository", str(place))
    assert (shown.returncode, shown.stderr.splitlines()[-1]) == (4, "  fix: there are 1, 2")
    (place / TINY / "1" / "model.onnx").write_bytes(b"something else")
    with pytest.raises(BadRepository, match="changed after it was published"):
        rollout.promote(place, TINY, 1)
    (place / TINY / "1" / repository.LINEAGE).unlink()
    with pytest.raises(BadRepository, match="no lineage"):
        rollout.promote(place, TINY, 1)
    assert (place / TINY / "config.pbtxt").read_bytes() == before
    assert states(place) == {1: "staged", 2: "live"}
    with pytest.raises(BadRepository, match="no other version was live"):
        rollout.before(place, TINY)


@pytest.mark.timed
@pytest.mark.slow
def test_no_request_fails_while_versions_change(place: Path, server_prefix: Path) -> None:
    """Twelve changes between two versions with different configurations, under four connections."""
    reconfigure(place, 1)
    failed: list[BaseException] = []
    seen: list[float] = []
    stop = threading.Event()

    def ask(endpoint: Endpoint) -> None:
        with connect(endpoint.grpc) as client:
            while not stop.is_set():
                try:
                    seen.append(float(client.infer(TINY, {"x": ONE})["y"][0, 0]))
                except Exception as error:
                    failed.append(error)
                time.sleep(0.01)

    with running(place, grace=0) as endpoint:
        threads = [threading.Thread(target=ask, args=(endpoint,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in 6 * [1, 2]:
                rollout.promote(place, TINY, number, endpoint)
                assert control.versions(endpoint.http, TINY) == [number]
                np.testing.assert_allclose(answer(endpoint), number * ONE @ TINY_WEIGHT, rtol=1e-6)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert not failed, failed[0]
    assert len(seen) > 100
    np.testing.assert_allclose(sorted(set(seen)), (ONE @ TINY_WEIGHT)[0, 0] * np.array([1, 2]), rtol=1e-6)


def test_a_version_that_does_not_load_replaces_nothing(place: Path, server_prefix: Path) -> None:
    broken = place / TINY / "1" / "model.onnx"
    broken.write_bytes(b"no model at all")
    path = broken.with_name(repository.LINEAGE)
    lineage = json.loads(path.read_text())
    lineage["digests"]["model.onnx"] = repository.digest(broken)
    path.write_text(json.dumps(lineage))
    config = (place / TINY / "config.pbtxt").read_bytes()
    with running(place, grace=0) as endpoint:
        with pytest.raises(ModelRefused, match="version 1 is not loaded, what was live still is"):
            rollout.promote(place, TINY, 1, endpoint)
        np.testing.assert_allclose(answer(endpoint), 2 * ONE @ TINY_WEIGHT, rtol=1e-6)
        assert control.versions(endpoint.http, TINY) == [2]
    assert (place / TINY / "config.pbtxt").read_bytes() == config
    assert states(place) == {1: "failed", 2: "live"}
    with running(place, grace=0) as endpoint:
        np.testing.assert_allclose(answer(endpoint), 2 * ONE @ TINY_WEIGHT, rtol=1e-6)


def test_the_commands_find_the_running_server(place: Path, server_prefix: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "runtime"
    env = {"XDG_RUNTIME_DIR": str(runtime)}
    other = str(runtime / ".." / place.name)
    at = ("--repository", other)
    with up(place, runtime) as (process, ready):
        second = serve("up", other, "--http-port", "0", env=env)
        assert (second.returncode, "is served already" in second.stderr) == (5, True)
        done = serve("promote", TINY, "1", *at, env=env)
        assert done.stdout == f"live: {TINY} version 1, loaded at {ready['http']}\n", done.stderr
        assert control.versions(ready["http"], TINY) == [1]
        told = json.loads(serve("why", TINY, *at, "--json", env=env).stdout)
        assert [entry["number"] for entry in told["versions"]] == [1]
        assert told["url"] == ready["http"]
        assert "made_by: a test" in serve("why", TINY, *at, env=env).stdout
        assert json.loads(serve("rollback", TINY, *at, "--json", env=env).stdout)["live"] == 2
        assert control.versions(ready["http"], TINY) == [2]
        # A status is the server's word, also where the repository went on without it.
        rollout.promote(place, TINY, 1)
        (server,) = json.loads(serve("status", "--json", env=env).stdout)["servers"]
        assert server["state"] == "live"
        assert server["models"] == [{"name": TINY, "versions": [2], "health": "answers"}]
        rollout.promote(place, TINY, 2)
        process.terminate()
        process.communicate(timeout=60)
    listed = json.loads(serve("list", *at, "--json", env=env).stdout)["models"]
    assert [(entry["number"], entry["state"]) for entry in listed[0]["versions"]] == [(1, "previous"), (2, "live")]
    assert serve("promote", TINY, *at, env=env).stdout == f"live: {TINY} version 2, no server runs\n"
    assert serve("remove", TINY, "--keep", "1", *at, env=env).stdout == "removed: nothing\n"
    wrong = serve("promote", TINY, "9", *at, env=env)
    assert (wrong.returncode, wrong.stdout) == (4, "")
    assert "there is no version 9" in wrong.stderr


def asked(env: dict[str, str]) -> dict[str, str]:
    """What `serve status` says of each model."""
    found = json.loads(serve("status", "--json", env=env).stdout)["servers"]
    return {model["name"]: model["health"] for model in found[0]["models"]}


def watched(env: dict[str, str]) -> set[str]:
    """The models that `serve watch` shows."""
    told = json.loads(serve("watch", "--json", "--interval", "500ms", env=env).stdout)
    return {model["model"] for model in told["intervals"][0]["models"]}


@pytest.mark.timed
def test_a_new_model_reaches_the_running_server_and_goes_again(
    place: Path, server_prefix: Path, tmp_path: Path, publish_tiny: Publish
) -> None:
    from onnx import load, save

    runtime = tmp_path / "runtime"
    link = tmp_path / "link"
    link.symlink_to(place)
    env, at = {"XDG_RUNTIME_DIR": str(runtime)}, ("--repository", str(link))
    onnx = str(save_tiny(tmp_path / "tiny.onnx"))
    with up(place, runtime) as (process, ready), connect(ready["grpc"]) as client:
        done = serve("add", onnx, "--name", "added", "--no-check", *at, env=env)
        assert done.stdout == f"live: added version 1, loaded at {ready['http']}\n", done.stderr
        publish_tiny(place, "promoted")
        assert asked(env)["promoted"] == "not loaded; load it with: serve promote promoted"
        assert serve("promote", "promoted", *at, env=env).returncode == 0
        names = {TINY, "added", "promoted"}
        assert asked(env) == dict.fromkeys(names, "answers")
        assert watched(env) == names
        for backend in backend_processes(ready["pid"]):
            os.kill(backend, signal.SIGKILL)
        assert eventually(lambda: set(asked(env).values()) == {"answers"})
        gone = serve("remove", "added", "--all", *at, env=env)
        assert gone.stdout == "removed: 1\n", gone.stderr
        with pytest.raises(ModelMissing):
            client.infer("added", {"x": ONE})
        assert set(asked(env)) == watched(env) == {TINY, "promoted"}
        model = load(onnx)
        model.graph.node[0].op_type = "NoSuchOperator"
        save(model, onnx)
        refused = serve("add", onnx, "--name", "added", "--no-check", *at, env=env)
        assert refused.returncode == 4
        assert "version 2 is not loaded: " in refused.stderr  # 1 was given once
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert "added" not in said.replace("a backend process of added was dead; the model is loaded again", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model_repository", "runtime", "tiny.onnx"]


def test_what_remove_needs_to_know(place: Path) -> None:
    for options in ((), ("--keep", "1", "--all")):
        done = serve("remove", TINY, *options, "--repository", str(place))
        assert (done.returncode, "one of --keep and --all" in done.stderr) == (2, True)
    assert repository.models(place) == [TINY]
