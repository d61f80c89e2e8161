"""`serve tune` as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import serve
from modelathe import files
from modelathe.errors import MachineError, UsageError
from serve.cli import main
from serve.planning.served import configuration
from serve.repository import tree
from serve.rollout import rollout
from serve.server import dryload
from serve.simulate import curve_file
from serve.tuning import cores, trial
from serve.tuning.cores import Used
from serve.tuning.tune import diff
from tests.docs.blocks import ROOT
from tests.docs.test_pages import stated
from tests.serve.tuning.world import World, installed

MODEL = "digits_cnn"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    place = tmp_path / "models"
    shutil.copytree(ROOT / "model_repository" / MODEL, place / MODEL)
    return place


@pytest.fixture
def slow(repository: Path) -> Path:
    """A repository whose model is live as version 2, with one thread."""
    serve.add(repository / MODEL / "1", repository, name=MODEL, settings={"threads": 1}, check=False, quiet=True)
    rollout.promote(repository, MODEL, 2)
    return repository


def tune(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", MODEL, "--repository", str(repository), "--quiet", *arguments])


def snapshot(repository: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--slo", "p99 < 20ms", "--for", "latency"), 2, "--for latency needs a rate"),
        (("--slo", "p99 < 20ms", "--for", "throughput", "--rate", "9"), 2, "looks for the rate itself"),
        (("--slo", "p99 > 20ms", "--rate", "9"), 2, "nothing that a simulation can hold"),
        (("--slo", "p99 < 20ms", "--rate", "9", "--arrival", "sometimes"), 2, "no arrival is called"),
        (("--slo", "p99 < 20ms", "--trace", "trace.txt", "--rate", "9"), 2, "--trace says when requests come"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_starts(
    repository: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = tune(repository, *arguments)
    assert (done.exit_code, said in done.stderr) == (code, True), done.stderr


def test_a_trace_of_one_request_is_refused(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("0.5\n")
    done = tune(repository, "--slo", "p99 < 20ms", "--trace", str(tmp_path / "trace.txt"))
    assert done.exit_code == 4
    assert "holds 1 request" in done.stderr


def test_a_model_that_is_not_there_or_not_live_is_refused(repository: Path) -> None:
    asked = ("--repository", str(repository), "--slo", "p99 < 20ms")
    missing = CliRunner().invoke(main, ["tune", "other", *asked])
    assert (missing.exit_code, "no such model" in missing.stderr) == (4, True)
    shutil.move(repository / MODEL / "1", repository / MODEL / "2")
    staged = CliRunner().invoke(main, ["tune", MODEL, *asked])
    assert (staged.exit_code, "no version of it is live" in staged.stderr) == (4, True)


def test_the_difference_is_what_is_turned(repository: Path) -> None:
    subject = trial.subject(repository, MODEL)
    now = configuration(subject.config)
    assert diff(subject, now) == ""
    turned = trial.edited(subject.config, type(now)(**{**vars(now), "threads": 1, "instances": 2, "delay": 0.001}))
    assert configuration(turned) == type(now)(**{**vars(now), "threads": 1, "instances": 2, "delay": 0.001})


def test_a_busy_machine_is_told_with_what_was_seen() -> None:
    count = len(os.sched_getaffinity(0))
    cores.check(Used(1.0, 0.1 * count, 5.0), "during a live run")
    with pytest.raises(
        MachineError, match=rf"too busy to measure: during a live run, other programs used .* {count} "
    ) as found:
        cores.check(Used(1.0, 0.5 * count, 5.0), "during a live run")
    assert found.value.exit_code == 5


def test_what_is_used_here_is_counted_by_the_processor() -> None:
    watch, begun = cores.Watch(os.getpid()), time.process_time()
    while time.process_time() - begun < 0.2:
        pass
    seen = watch.used()
    # This process stands for the server and for the client.
    # The system counts in ticks of 10 ms.
    assert seen.ours * seen.seconds >= 0.35
    assert seen.others >= 0


def live(monkeypatch: pytest.MonkeyPatch, world: World | None = None) -> World:
    """Let the command live in a world whose truth is known, and publish without a server."""
    monkeypatch.setattr(dryload, "staged", lambda *_: "")
    return installed(monkeypatch, world or World())


ASKED = ("--slo", "p99 < 30ms", "--rate", "200")


def test_apply_publishes_a_candidate_and_promote_makes_it_live(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(monkeypatch)
    measured = tmp_path / "out" / "measured.json"
    done = tune(slow, *ASKED, "--measured", str(measured), "--apply", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["applied"]) == (0, 3), done.stderr
    assert not stated()["serve tune"] - told.keys()
    assert (tmp_path / "out" / "tune.html").exists()
    assert tree.live(slow, MODEL) == [2]
    assert tree.read_lineage(slow, MODEL, 3)["tuned"]["objective"] == "p99 < 30ms"
    rollout.promote(slow, MODEL, 3)
    now = configuration(tree.config(slow, MODEL))
    wanted = {key: told["chosen"][key] for key in ("threads", "instances", "max_batch")}
    assert {key: getattr(now, key) for key in wanted} == wanted
    assert round(now.delay * 1e6) == told["chosen"]["delay_us"]


def test_apply_while_another_command_works_on_the_model_is_refused_by_name(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = live(monkeypatch)
    with files.locked(slow / MODEL):
        done = tune(slow, *ASKED, "--measured", str(tmp_path / "out" / "measured.json"), "--apply")
    assert (done.exit_code, f"{slow / MODEL}: another command" in done.stderr) == (5, True), done.stderr
    assert not world.runs
    assert tree.numbers(slow, MODEL) == [1, 2]


def test_another_version_that_was_promoted_meanwhile_is_named(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = live(monkeypatch)
    ends = world.run

    def run(*asked: Any) -> Any:
        if tree.live(slow, MODEL) == [2]:
            rollout.promote(slow, MODEL, 1)
        return ends(*asked)

    monkeypatch.setattr(world, "run", run)
    done = tune(slow, *ASKED, "--measured", str(tmp_path / "out" / "measured.json"), "--apply")
    assert (done.exit_code, "another was promoted meanwhile" in done.stderr) == (4, True), done.stderr
    assert tree.numbers(slow, MODEL) == [1, 2]


def test_a_failed_version_beside_the_live_one_is_left_alone(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live(monkeypatch)
    serve.add(slow / MODEL / "1", slow, name=MODEL, check=False, quiet=True)
    tree.note(slow / MODEL / "3", failed="it did not load")
    done = tune(slow, *ASKED, "--measured", str(tmp_path / "out" / "measured.json"), "--apply", "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["version"], told["applied"]) == (0, 2, 4), done.stderr
    states = {one.number: one.state for one in rollout.standings(slow, MODEL)}
    assert states == {1: "previous", 2: "live", 3: "failed", 4: "staged"}


def test_what_is_held_back_ends_with_3_and_its_figures(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Live, it is better than it was predicted each time.
    world = live(monkeypatch, World(odd={(2, 1): 0.5, (2, 2): 0.5}))
    monkeypatch.setattr("serve.tuning.tune.AFTER", 0)
    monkeypatch.setattr("serve.tuning.confirm.RUNS", 4)
    done = tune(slow, *ASKED, "--measured", str(tmp_path / "out" / "measured.json"), "--apply", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 3, world.runs
    assert "not applied" in told["error"]["what"]
    assert (told["chosen"]["name"], told["applied"]) == ("today", None)
    assert next(one for one in told["confirmed"] if one["name"] == told["best"])["measured"]["holds"]


def test_python_calls_it_alike(slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(monkeypatch)
    found = serve.tune(MODEL, "p99 < 30ms", slow, rate=200, measured=tmp_path / "out" / "measured.json", quiet=True)
    assert found.check().chosen == found.document["chosen"]
    assert "today" in found.view().figures
    assert next(iter(found.to_pandas()["name"])) == "today"
    with pytest.raises(UsageError, match="did you mean 'rate'"):
        serve.tune(MODEL, "p99 < 30ms", slow, rat=200)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="there is no goal"):
        serve.tune(MODEL, "p99 < 30ms", slow, goal="speed")  # type: ignore[arg-type]


HURRIED = """
import sys
from serve.tuning import confirm, cores, grid, measure, measuring
grid.DELAYS, grid.REQUESTS, grid.LONGEST = (0.0, 0.001), 300, 1.0
cores.BUSY, measure.AGAIN, measure.SECONDS, measure.WARM = 10.0, 50.0, 0.02, 0.01
measuring.FIT_SECONDS, measuring.PRESSED, confirm.SHORTEST, confirm.REQUESTS = 1.0, 0.5, 1.0, 100
from serve.cli import main
main()
"""
"""`serve tune` in a hurry: what it finds is worth nothing, what it does is the same."""


@contextmanager
def hurried(repository: Path, measured: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    asked = ["tune", MODEL, "--repository", str(repository), "--slo", "p99 < 2s", "--rate", "100"]
    command = [sys.executable, "-c", HURRIED, *asked, "--measured", str(measured), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], begins: str) -> list[str]:
    """Return what it says until a line begins so."""
    assert process.stderr
    said: list[str] = []
    while not (said and said[-1].startswith(begins)):
        line = process.stderr.readline()
        assert line, said
        said.append(line)
    return said


@pytest.mark.slow
@pytest.mark.timed
def test_a_real_server_is_measured_after_ctrl_c_and_a_death(
    server_prefix: Path, repository: Path, tmp_path: Path
) -> None:
    measured, before = tmp_path / "out" / "measured.json", snapshot(repository)
    with hurried(repository, measured) as process:
        until(process, "live: best-1")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    kept = json.loads(measured.read_text())
    assert len(kept["live"]) == 1
    assert set(kept["threads"]) >= {"1", "2"}
    with hurried(repository, measured) as process:
        said = until(process, "live: best-1")
        # What was measured before is not measured again.
        assert not any(line.startswith(("measuring", "live: overheads", "live: today")) for line in said)
        server = next(pid for pid in _children(process.pid) if "tritonserver" in Path(f"/proc/{pid}/comm").read_text())
        os.kill(server, signal.SIGKILL)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 5, rest
    assert "error: " in rest
    with hurried(repository, measured, "--json") as process:
        out, rest = process.communicate(timeout=120)
    told = json.loads(out)
    assert not stated()["serve tune"] - told.keys()
    assert process.returncode == (3 if "error" in told else 0), rest
    assert [one["name"] for one in told["confirmed"]][:2] == ["today", "best-1"]
    assert all(one["measured"]["requests"] > 50 for one in told["confirmed"])
    times = curve_file.read(measured)
    assert (times.model, sorted(times.calls)) == (MODEL, [1, 2, 4, 8, 16, 32])
    assert (snapshot(repository), tree.numbers(repository, MODEL)) == (before, [1])


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]
