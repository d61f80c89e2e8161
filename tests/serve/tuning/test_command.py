"""`serve tune` as a user runs it."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from serve.cli import main
from serve.planning.served import configuration
from serve.repository import tree
from serve.simulate import curve_file
from serve.tuning import trial
from serve.tuning.tune import diff
from tests.docs.blocks import ROOT
from tests.docs.test_pages import stated

MODEL = "digits_cnn"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    place = tmp_path / "models"
    shutil.copytree(ROOT / "model_repository" / MODEL, place / MODEL)
    return place


def tune(repository: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", MODEL, "--repository", str(repository), "--quiet", *arguments])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--slo", "p99 < 20ms", "--for", "latency"), 2, "--for latency needs a rate"),
        (("--slo", "p99 < 20ms", "--for", "throughput", "--rate", "9"), 2, "looks for the rate itself"),
        (("--slo", "p99 > 20ms", "--rate", "9"), 2, "nothing that a simulation can hold"),
        (("--slo", "p99 < 20ms", "--rate", "9", "--arrival", "sometimes"), 2, "no arrival is called"),
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


@pytest.mark.slow
@pytest.mark.timed
def test_a_real_server_is_measured_and_the_best_confirmed(
    server_prefix: Path, repository: Path, tmp_path: Path
) -> None:
    measured = tmp_path / "measured.json"
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    done = tune(repository, "--slo", "p99 < 500ms", "--rate", "100", "--measured", str(measured), "--json")
    told = json.loads(done.stdout)
    assert not stated()["serve tune"] - told.keys()
    # What was predicted may be off where other programs run beside: that is said, with 3.
    assert done.exit_code == (0 if told["chosen"] else 3), done.stderr
    names = [one["name"] for one in told["confirmed"]]
    assert names == ["today", "best-1", "best-2", "best-3"][: len(names)]
    assert len(names) > 1
    assert all(one["measured"]["requests"] > 500 for one in told["confirmed"])
    assert all(one["sound"] == (one["off"] <= 0.2 and one["measured"]["holds"]) for one in told["confirmed"])
    times = curve_file.read(measured)
    assert (times.model, sorted(times.calls)) == (MODEL, [1, 2, 4, 8, 16, 32])
    assert set(json.loads(measured.read_text())["threads"]) >= {"1", "2"}
    assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
    assert tree.numbers(repository, MODEL) == [1]
