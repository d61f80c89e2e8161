"""A kill at any operation of promote, rollback, add and remove: old or new, and a rollback to what really served."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from serve.config.target import Target
from serve.repository import staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server import control
from tests.conftest import TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny
from tests.serve.commands.test_up import ROOT, serve, up
from tests.serve.server.test_server import eventually

OLD = {"part": [1], "tiny": [2], "whole": [1]}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 2 of `tiny` lives and 1 did before; 3 and 4 wait. `part` and `whole` wait with a second version each."""
    home = tmp_path_factory.mktemp("template")
    place = home / "repository"

    def publish(model: str, factor: float, lineage: dict[str, Any]) -> None:
        onnx = save_tiny(home / "tiny.onnx", factor * TINY_WEIGHT)
        with staging.stage(place, model, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
            staging.publish(staged, lineage)

    for number in (1, 2, 3, 4):
        publish("tiny", number, {})
    for number in (1, 2):
        for model in ("part", "whole"):
            publish(model, number, {"parts": {"part": number, "whole": number}})
    for model, number in (("tiny", 1), ("tiny", 2), ("whole", 1)):
        rollout.promote(place, model, number)
    (home / "tiny.onnx").unlink()
    (home / "server.json").write_text(json.dumps(OLD))
    (home / "server.log").write_text("tiny/1 tiny/2 part/1 whole/1\n")
    assert rollout.before(place, "tiny") == 1
    return home


def kill_everywhere(verb: str, template: Path, server: str, folder: Path, *left: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.serve.killing", verb, str(template), server, str(folder), *left]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("verb", "server", "new"),
    [
        ("promote", "server", {**OLD, "tiny": [3]}),
        ("promote", "no server", {**OLD, "tiny": [3]}),
        ("rollback", "server", {**OLD, "tiny": [1]}),
        ("together", "server", {**OLD, "part": [2], "whole": [2]}),
        ("together", "no server", {**OLD, "part": [2], "whole": [2]}),
        ("add", "server", {**OLD, "added": [1]}),
    ],
)
def test_a_kill_leaves_old_or_new(
    template: Path, tmp_path: Path, verb: str, server: str, new: dict[str, list[int]]
) -> None:
    seen = kill_everywhere(verb, template, server, tmp_path)
    assert len(seen) > 8
    assert seen[0]["settled"] == OLD
    assert seen[-1]["settled"] == new
    for one in seen:
        assert one["settled"] in (OLD, new)
        assert one["left"] in (OLD, new) or one["promised"], one
        live = one["settled"]["tiny"][0]
        assert one["back"] != live
        if server == "server":
            # What is loaded is what the repository says, and nothing is rolled back to that never was.
            assert {model: one["loaded"].get(model) or [1] for model in one["settled"]} == one["settled"]
            assert f"tiny/{one['back']}" in one["served"]
        else:
            assert one["back"] == (1 if one["settled"]["tiny"] == [2] else 2)
        assert one["again"] == (new if verb in ("promote", "together") else one["settled"])


def test_a_kill_while_a_release_is_taken_back(template: Path, tmp_path: Path) -> None:
    """The server has the new version until the last moment; what the disk says decides."""
    seen, new = kill_everywhere("interrupted", template, "server", tmp_path), {**OLD, "tiny": [3]}
    settled = [one["settled"] for one in seen]
    assert OLD == settled[0] == settled[-1]
    assert new in settled
    for one in seen:
        assert one["settled"] == (new if one["left"] == one["had"] == new else OLD)
        assert one["loaded"] == one["settled"]
        assert one["back"] == (2 if one["settled"] == new else 1)


def test_a_kill_while_models_that_belong_together_are_taken_back(template: Path, tmp_path: Path) -> None:
    """The server has the new version of one of them alone, so that nothing is finished."""
    seen = kill_everywhere("interrupted together", template, "server", tmp_path)
    assert len(seen) > 8
    assert any(one["left"]["part"] != one["left"]["whole"] for one in seen)
    for one in seen:
        assert one["settled"] == one["loaded"] == OLD


@pytest.mark.parametrize("left", [("disk", "server"), ("disk",), ("server",), ()], ids=" and ".join)
def test_a_kill_of_what_settles_changes_nothing_in_the_end(
    template: Path, tmp_path: Path, left: tuple[str, ...]
) -> None:
    """Only what both the disk and the server have is finished, and only that has lived."""
    seen = kill_everywhere("settle", template, "server", tmp_path, *left)
    assert len(seen) > 4
    finished = len(left) == 2
    for one in seen:
        assert one["settled"] == one["again"] == {**OLD, "tiny": [3 if finished else 2]}
        assert one["loaded"] == one["settled"]
        assert one["back"] == (2 if finished else 1)


def test_a_kill_of_remove_takes_whole_versions(template: Path, tmp_path: Path) -> None:
    """Version 3 alone may go: 4 is the newest, 2 is live, 1 is what it would be rolled back to."""
    seen = kill_everywhere("remove", template, "server", tmp_path)
    assert [seen[0]["numbers"]["tiny"], seen[-1]["numbers"]["tiny"]] == [[1, 2, 3, 4], [1, 2, 4]]
    for one in seen:
        assert one["numbers"]["tiny"] in ([1, 2, 3, 4], [1, 2, 4])
        assert (one["settled"], one["back"]) == (OLD, 1)


def test_a_kill_of_remove_all_takes_the_model_or_leaves_it(template: Path, tmp_path: Path) -> None:
    seen = kill_everywhere("remove all", template, "no server", tmp_path)
    without = {model: numbers for model, numbers in OLD.items() if model != "tiny"}
    assert [seen[0]["settled"], seen[-1]["settled"]] == [OLD, without]
    assert all(one["settled"] in (OLD, without) for one in seen)


def test_what_a_kill_left_in_the_server_goes_with_the_same_command(
    template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.serve.killing import ENDPOINT

    asked: list[str] = []
    monkeypatch.setattr(rollout.control, "versions", lambda url, model: [1])
    monkeypatch.setattr(rollout.control, "unload", lambda url, secret, model: asked.append(model))
    assert rollout.remove_model(template / "repository", "gone", ENDPOINT) == []
    assert asked == ["gone"]
    assert repository.models(template / "repository") == sorted(OLD)


def loads(env: dict[str, str], model: str) -> dict[int, tuple[str, str]]:
    """What the server that runs says of each version."""
    (path,) = Path(env["XDG_RUNTIME_DIR"], "modelathe").glob("server-*.json")
    known = json.loads(path.read_text())
    return control.states(known["http"], known["secret"], model)


@pytest.mark.slow
def test_a_kill_of_serve_promote_at_any_moment(template: Path, tmp_path: Path, server_prefix: Path) -> None:
    """Under a real server: `make kills` does it fifty times."""
    place, runtime = tmp_path / "repository", tmp_path / "runtime"
    shutil.copytree(template / "repository", place)
    env, at = {"XDG_RUNTIME_DIR": str(runtime)}, ("--repository", str(place))
    promote = [sys.executable, "-m", "serve", "promote", "tiny"]
    rng, served, ends = random.Random(0), {1, 2}, set()
    with up(place, runtime) as (process, ready):
        begun = time.monotonic()
        assert serve("promote", "tiny", "1", *at, env=env).returncode == 0
        longest = time.monotonic() - begun
        for _ in range(int(os.environ.get("KILLS", "4"))):
            (now,) = control.versions(ready["http"], "tiny")
            wanted = rng.choice([number for number in (1, 2, 3) if number != now])
            with subprocess.Popen(
                [*promote, str(wanted), *at], cwd=ROOT, env={**os.environ, **env}, stderr=subprocess.DEVNULL
            ) as command:
                time.sleep(rng.uniform(longest / 3, longest))
                command.kill()
            ends.add(command.returncode)
            time.sleep(0.2)
            # The server goes on with a load that nobody waits for any more.
            assert eventually(lambda: "LOADING" not in {state for state, _ in loads(env, "tiny").values()})
            served.update(control.versions(ready["http"], "tiny"))
            back = serve("rollback", "tiny", *at, "--json", env=env)
            assert back.returncode == 0, back.stderr
            assert json.loads(back.stdout)["live"] in served
            repository.verify(place)
            assert control.versions(ready["http"], "tiny") == repository.live(place, "tiny")
            assert not list(place.glob("*/.promotion.json"))
            served.update(repository.live(place, "tiny"))
        process.terminate()
        process.communicate(timeout=60)
    assert -signal.SIGKILL in ends
