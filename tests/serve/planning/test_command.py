"""`serve plan` as a user runs it."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import serve
from modelathe.commandline import finite
from modelathe.errors import UsageError
from serve.cli import main
from tests.browser import assert_fits, needs_browser
from tests.docs.blocks import ROOT
from tests.serve.planning.curves import written
from tests.terminal import on_a_terminal

QUICK = ("--requests", "10000", "--quiet")


@pytest.fixture
def times(tmp_path: Path) -> Path:
    return written(tmp_path / "digits.json")


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    (tmp_path / "prices.toml").write_text('[[machine]]\nname = "c2"\ncores = 2\nprice = 0.09\n')
    return tmp_path / "prices.toml"


def plan(times: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", "--measured", str(times), *QUICK, *arguments])


def test_the_document_holds_what_the_manifests_read(times: Path, prices: Path) -> None:
    asked = ("--rate", "20000", "--slo", "p99 < 12ms", "--zones", "3", "--machines", str(prices))
    done = plan(times, *asked, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["model"], told["machine"], told["start_seconds"], told["reacts_seconds"]) == (
        "digits_cnn",
        "c2",
        8,
        83,
    )
    replicas = told["replicas"]
    assert replicas > told["smallest"]["replicas"]
    assert 0 < told["per_pod_rate"] < told["knee"]
    assert told["knee"] * replicas == pytest.approx(told["planned"]["headroom"]["rate"])
    assert told["cost"]["per_million"] == pytest.approx(replicas * 0.09 / 3600 / 20_000 * 1e6)
    assert [case["case"] for case in told["cases"]] == ["replica", "zone", "burst", "update"]
    assert [outcome["rate"] for outcome in told["curve"]] == sorted(outcome["rate"] for outcome in told["curve"])
    again = json.loads(plan(times, *asked, "--json").stdout)
    assert again == told


def test_at_eighty_columns_nothing_is_cut(times: Path, prices: Path) -> None:
    asked = ("--rate", "50000", "--slo", "p99 < 12ms, errors < 0.1%", "--zones", "3", "--machines", str(prices))
    command = (sys.executable, "-m", "serve", "plan", "--measured", str(times), *QUICK, *asked)
    wide, narrow = (on_a_terminal(width, *command) for width in (200, 80))
    assert set(narrow.split()) <= set(wide.split())
    assert max(map(len, narrow.splitlines())) <= 80
    table = [line.rstrip() for line in narrow.splitlines() if "replica lost" in line or "zones lost" in line]
    assert table and all(re.search(r" (yes|NO) +\d+$", line) for line in table)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--slo", "p99 < 12ms"), 2, "no rate was given"),
        (("--slo", "p99 < 12ms", "--rate", "0"), 2, "--rate"),
        (("--slo", "p99 < 12ms", "--rate", "-5"), 2, "--rate"),
        (("--slo", "p99 < 12ms", "--rate", "nan"), 2, "--rate"),
        (("--slo", "p99 < 12ms", "--rate", "inf"), 2, "--rate"),
        (("--slo", "p99 < 12", "--rate", "5"), 2, "a unit"),
        (("--slo", "max < 12ms", "--rate", "5"), 2, "nothing that a simulation can hold"),
        (("--slo", "p99 < 12ms", "--rate", "5", "--arrival", "bursty"), 2, "--arrival 'bursty'"),
        (("--slo", "p99 < 12ms", "--trace", "no", "--arrival", "poisson"), 2, "leave one away"),
        (("--slo", "p99 < 12ms", "--trace", "no-such-file"), 4, "no such file"),
        (("--slo", "p99 < 12ms", "--rate", "5", "--machines", "no-such-file"), 4, "no such file"),
        (("--slo", "p99 < 1ms", "--rate", "5"), 3, "the lowest which can be reached"),
        (("--slo", "p99 < 12ms", "--rate", "50000", "--most", "3"), 3, "up to 3 holds"),
        (("other", "--slo", "p99 < 12ms", "--rate", "5"), 4, "of 'digits_cnn', not of 'other'"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(
    arguments: tuple[str, ...], code: int, said: str, times: Path
) -> None:
    where = ("--repository", str(ROOT / "model_repository"))
    done = plan(times, *arguments, *where, "--json")
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == error["exit"] == code
    assert said in f"{error['what']} {error['fix']}"


def test_a_list_without_the_machine_is_refused(times: Path, prices: Path) -> None:
    done = plan(times, "--slo", "p99 < 12ms", "--rate", "5", "--machines", str(prices), "--machine", "c9", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == error["exit"] == 4
    assert error["what"] == "has no price for the machine 'c9'"
    assert error["fix"].endswith("it lists c2")


def test_python_gets_what_the_command_prints(times: Path, prices: Path) -> None:
    asked = {"rate": 5000, "machines": prices, "requests": 10_000, "quiet": True, "growth": 0.2, "fail": None}
    found = serve.plan("digits_cnn", measured=times, slo="p99 < 12ms", repository=ROOT / "model_repository", **asked)
    options = ("--rate", "5000", "--slo", "p99 < 12ms", "--machines", str(prices), "--growth", "20%")
    told = plan(times, "digits_cnn", "--repository", str(ROOT / "model_repository"), *options, "--json")
    assert json.loads(json.dumps(finite(found.document))) == json.loads(told.stdout)
    assert (found.replicas, found.smallest) == (found.document["replicas"], found.document["smallest"]["replicas"])
    assert found.headroom >= 1 and found.per_pod_rate and found.per_million
    shown = found.view()
    assert shown.title.startswith("digits_cnn: ") and "cost" in shown.figures


def test_python_is_told_of_a_wrong_option(times: Path) -> None:
    for options, said in (
        ({"zone": 3}, "zones"),
        ({"zones": 1}, "zones = 1"),
        ({"balance": "fair"}, "balance = 'fair'"),
    ):
        with pytest.raises(UsageError, match=said):
            serve.plan(measured=times, slo="p99 < 12ms", rate=5, **options)


def test_a_trace_with_one_request_is_refused(times: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("1\n")
    done = plan(times, "--slo", "p99 < 12ms", "--trace", str(tmp_path / "trace.txt"))
    assert done.exit_code == 4
    assert "holds 1 request, and 299 are needed" in done.stderr


def test_a_trace_has_a_rate_of_its_own(times: Path, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("".join(f"{at / 500}\n" for at in range(2000)))
    told = [
        json.loads(plan(times, "--slo", "p99 < 12ms", "--trace", str(tmp_path / "trace.txt"), "--json", *more).stdout)
        for more in ((), ("--rate", "4000"))
    ]
    assert [one["rate"] for one in told] == [pytest.approx(500), 4000]
    assert told[1]["replicas"] > told[0]["replicas"]


def test_the_configuration_comes_from_the_repository(times: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_repository", tmp_path / "repository")
    config = tmp_path / "repository" / "digits_cnn" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_batch_size: 32", "max_batch_size: 2"))
    asked = ("--rate", "5000", "--slo", "p99 < 12ms", "--json")
    small = json.loads(plan(times, "digits_cnn", "--repository", str(tmp_path / "repository"), *asked).stdout)
    assert small["configuration"]["max_batch"] == 2
    assert not any("measured with" in note for note in small["notes"])
    assert small["replicas"] > json.loads(plan(times, *asked).stdout)["replicas"]


def test_times_of_another_configuration_are_told(tmp_path: Path) -> None:
    times = written(tmp_path / "one.json", configuration={"max_batch": 32, "threads": 1, "instances": 3})
    asked = ("--repository", str(ROOT / "model_repository"), "--rate", "900", "--slo", "p99 < 12ms", "--json")
    notes = json.loads(plan(times, "digits_cnn", *asked).stdout)["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        "measured with threads = 1, served with 2",
        "measured with instances = 3, served with 1",
    ]
    assert any("cost each other" in note for note in json.loads(plan(times, *asked).stdout)["notes"])


def test_without_a_configuration_a_model_is_asked_for(tmp_path: Path) -> None:
    done = plan(written(tmp_path / "bare.json", configuration=None), "--rate", "5", "--slo", "p99 < 12ms")
    assert done.exit_code == 4
    assert "name MODEL too" in done.stderr


@needs_browser
@pytest.mark.slow
def test_the_page_fits(times: Path, tmp_path: Path) -> None:
    place = tmp_path / "plan.html"
    done = plan(times, "--rate", "20000", "--slo", "p99 < 12ms", "--page", str(place))
    assert done.exit_code == 0, done.stderr
    assert "replicas for 20,000/s" in place.read_text()
    assert_fits(place, tmp_path)
