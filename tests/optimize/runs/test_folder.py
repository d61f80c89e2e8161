"""A run's folder is its own: no other run changes it, and nothing but the user's word removes it."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelathe import files as files_of_ours
from modelathe.errors import UsageError
from optimize.runs.folder import listing, resume
from optimize.step.key import Key
from serve.repository import scratch
from tests.optimize.conftest import Optimize
from tests.optimize.runs.test_kills import RECIPE, USER

KEY = Key({"recipe": "ab" * 32, "code of user.py": "cd" * 32})
OTHER = Key({**KEY.parts, "recipe": "ef" * 32})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(folder: Path) -> Path:
    """Make a folder as a run leaves it, with something of the user's in it."""
    folder.mkdir(parents=True)
    resume.begin(folder, KEY, "seed = 0\n")
    for name in (*resume.PROOF, "notes.txt"):
        (folder / name).write_text("{}")
    return folder


def test_the_same_run_takes_its_old_proof_away_first(tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    resume.begin(folder, KEY, "seed = 0\n")
    assert set(files(folder)) == {resume.STATE, "recipe.toml", "notes.txt"}


def test_another_run_touches_nothing(tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    before = files(folder)
    with pytest.raises(UsageError, match="holds another run, which stays: what differs is recipe") as refused:
        resume.begin(folder, OTHER, "seed = 1\n")
    assert "--clean" in refused.value.fix
    assert files(folder) == before


def test_a_run_that_is_gone_before_it_was_looked_at_is_not_listed(
    tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = ended(tmp_path / "m" / "gone"), ended(tmp_path / "m" / "stays")
    found = listing.find

    def removed_after(place: Path) -> list[Path]:
        folders = found(place)
        shutil.rmtree(gone, ignore_errors=True)
        return folders

    monkeypatch.setattr(listing, "find", removed_after)
    told = optimize("runs", tmp_path, "--clean", "--yes", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["removed"] == [str(stays)]
    assert not listing.remove(gone), "another command has removed it"


def test_runs_are_listed_while_others_begin_end_and_go(tmp_path: Path) -> None:
    """Folders come and go at any moment; what is there all the time is always listed, and whole."""
    stays = ended(tmp_path / "m" / "stays")
    size = listing.size(stays)
    over = threading.Event()

    def coming_and_going(name: str) -> None:
        while not over.is_set():
            one = ended(tmp_path / name / "run")
            (one / "0-trained").mkdir()
            bundle = (one / "0-trained").rename(one / ".0-trained.saving-00000000").rename(one / "0-trained")
            (bundle / "weights").write_bytes(b"0" * 999)
            assert listing.remove(one)

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(coming_and_going, name) for name in ("a", "b", "m")]
        try:
            for _ in range(300):
                told = {entry["folder"]: entry for entry in map(listing.describe, listing.find(tmp_path)) if entry}
                assert told[str(stays)]["bytes"] == size
                assert all(not Path(folder).name.startswith(".") for folder in told)
        finally:
            over.set()
        for task in tasks:
            task.result()


def test_a_look_at_a_run_does_not_keep_it_from_beginning(tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    with ExitStack() as looking:
        looking.enter_context(files_of_ours.locked(folder))
        threading.Timer(0.2, looking.close).start()
        with scratch.locked(folder):
            assert (folder / resume.STATE).is_file()


def test_nobody_is_asked_where_nobody_sits_and_what_runs_stays(tmp_path: Path, optimize: Optimize) -> None:
    one, two = ended(tmp_path / "m" / "one"), ended(tmp_path / "m" / "two")
    asked = optimize("runs", tmp_path, "--clean")
    assert (asked.code, one.exists(), two.exists()) == (2, True, True)
    assert "--yes" in asked.err
    with scratch.locked(two):
        done = optimize("runs", tmp_path, "--clean", "--yes", "--json")
    told = json.loads(done.out)
    assert [entry["state"] for entry in told["runs"]] == ["unfinished", "running"]
    assert told["removed"] == [str(one)]
    assert told["bytes"] == told["runs"][0]["bytes"] > 0
    assert (one.exists(), two.exists()) == (False, True)
    assert not list(tmp_path.rglob(".*"))
    assert optimize("runs", two, "--clean", "--yes").code == 0
    assert not (tmp_path / "m").exists()
    assert optimize("runs", two).code == 4


def test_a_run_in_the_folder_of_another_stays(tmp_path: Path, optimize: Optimize) -> None:
    outer, inner = ended(tmp_path / "run"), ended(tmp_path / "run" / "inner")
    (outer / "1-export.onnx").mkdir()
    (tmp_path / "of another program").mkdir()
    (tmp_path / "of another program" / resume.STATE).write_text("{}")
    assert listing.find(tmp_path) == [outer, inner]
    before = files(inner)
    whole = {entry["folder"]: entry["bytes"] for entry in json.loads(optimize("runs", outer, "--json").out)["runs"]}
    assert whole == {str(outer): whole[str(inner)], str(inner): sum(map(len, before.values()))}
    assert listing.remove(outer)
    assert files(outer) == {f"inner/{name}": content for name, content in before.items()}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("said", "stays"), [("n\n", True), ("y\n", False)])
def test_clean_asks_with_the_bytes_that_would_go(said: str, stays: bool, tmp_path: Path) -> None:
    folder = ended(tmp_path / "run")
    size = listing.size(folder)
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "optimize", "runs", folder, "--clean"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, stdin=terminal, text=True, **pipes) as asked:
        os.write(controller, said.encode())
        out, _ = asked.communicate(timeout=60)
    assert f"{size:,} bytes" in out
    assert folder.exists() is stays
    os.close(controller)
    os.close(terminal)


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_a_second_recipe_leaves_the_first_run_and_takes_what_both_need(
    tmp_path: Path, optimize: Optimize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "one.toml").write_text(RECIPE)
    (tmp_path / "two.toml").write_text(RECIPE.replace('"export.onnx"}', '"export.onnx"}, {use = "quantize.dynamic"}'))
    runs = tmp_path / "build" / "runs" / "user"

    def run(name: str) -> dict[str, str]:
        ended = optimize("run", "user.py:workload", "--recipe", f"{name}.toml", "--json", *forced)
        assert ended.code == 0, ended.err
        return {**json.loads(ended.out), "err": ended.err}

    forced = ("--force",)  # a model this small gains nothing
    first = run("one")
    folder = tmp_path / Path(first["bundle"]).parent
    assert folder.parent == runs and (runs / "latest").resolve() == folder
    before = files(folder)
    second = run("two")
    other = tmp_path / Path(second["bundle"]).parent
    assert other != folder and (runs / "latest").resolve() == other
    assert files(folder) == before
    assert f"1-distill.logits is copied from {folder.relative_to(tmp_path)}" in second["err"]
    assert "distill.logits: kept from the last run" in second["err"]
    assert (other / "1-distill.logits" / "weights.safetensors").read_bytes() == before[
        "1-distill.logits/weights.safetensors"
    ]
    assert run("one")["bundle"] == first["bundle"], "the same run finds its folder again"

    listed = json.loads(optimize("runs", "--json").out)["runs"]
    assert {entry["folder"] for entry in listed} == {str(path.relative_to(tmp_path)) for path in (folder, other)}
    by_folder = {entry["folder"]: entry for entry in listed}
    entry = by_folder[str(other.relative_to(tmp_path))]
    assert (entry["name"], entry["steps"][-1]) == ("user", "quantize.dynamic")
    assert Path(entry["page"]).is_file() and entry["quality"]["metric"] == "agreement"
    shown = optimize("runs")
    assert shown.code == 0 and str(folder.relative_to(tmp_path)) in shown.out
    assert optimize("runs", other, "--clean", "--yes").code == 0
    assert {path.name for path in runs.iterdir()} == {folder.name, "latest"}
    assert optimize("runs", folder, "--clean", "--yes").code == 0
    assert not runs.exists(), "nor the link to what is gone"


def test_promote_wants_a_repository(tmp_path: Path, optimize: Optimize) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    ended = optimize("run", "user.py:workload", "--recipe", tmp_path / "recipe.toml", "--promote")
    assert (ended.code, "--promote: nothing is published" in ended.err) == (2, True)
