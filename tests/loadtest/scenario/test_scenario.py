import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loadtest.judge.summary import summarize
from loadtest.load.memory import Memory, watched
from loadtest.report.charts import GREEN, GREY, RED
from loadtest.scenario import judges, play, scenario
from loadtest.scenario import page as pages
from loadtest.selftest import nullserver
from modelathe.errors import BadInput, UsageError
from tests.loadtest.program import loadtest
from tests.loadtest.report.test_report import END, flights, write

SHIPPED = pytest.mark.parametrize("name", scenario.shipped())
ALLOWED = ("--allow-invalid",)
GOOD = """
description = "Two phases."
[[phase]]
name = "a"
duration = "2s"
rate = 50
[[phase]]
name = "b"
duration = 1
concurrency = 2
"""


@pytest.fixture(scope="module")
def null() -> Any:
    with nullserver.running(service=0.002, instances=2) as server:
        yield server


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_there_are_the_seven() -> None:
    assert set(scenario.shipped()) == {"steady", "ramp", "burst", "spike", "soak", "saturation", "batch-sweep"}


@SHIPPED
def test_every_shipped_scenario_loads_and_says_what_it_is(name: str) -> None:
    found = scenario.load(scenario.find(name))
    assert found.description.endswith(".")
    assert scenario.phases(found, 64)
    assert loadtest("scenario", "show", name).stdout.strip() == scenario.find(name).read_text().strip()


@pytest.mark.slow
@SHIPPED
def test_every_shipped_scenario_runs(null: Any, name: str, tmp_path: Path) -> None:
    short = ("--set", "duration=300ms", "--set", "warmup=0s", "--set", "saturation.duration=500ms", "--pid", null.pid)
    done = loadtest(
        "run", null.model, "--url", null.http, "--scenario", name, *short, "--output", tmp_path / "s", "--json"
    )
    document = json.loads(done.stdout)
    # A busy machine may make the run invalid or the server slow, and then the exit code says so too.
    good = document["valid"] and document["verdict"]["passed"]
    assert done.returncode == (0 if good else 3), done.stderr
    assert isinstance(document["valid"], bool)
    assert document["scenario"] == name
    assert document["verdict"].keys() == {"passed", "findings"}
    assert document["phases"]
    for phase in document["phases"]:
        assert phase["requests"]["done"] > 0
        assert Path(phase["results"]).is_file()
    assert json.loads((tmp_path / "s" / play.DOCUMENT).read_text())["phases"]


def test_a_list_shows_every_scenario() -> None:
    listed = json.loads(loadtest("scenario", "list", "--json").stdout)["scenarios"]
    assert [one["name"] for one in listed] == scenario.shipped()


@pytest.mark.timed
def test_the_report_names_every_phase(null: Any, tmp_path: Path) -> None:
    path = written(tmp_path, GOOD + 'thresholds = ["p99 < 1us"]')
    short = ("--set", "duration=300ms", "--set", "warmup=0s", "--set", "a.rate=40")
    page = tmp_path / "page.html"
    files = ("--output", tmp_path / "s", "--html", page)
    done = loadtest("run", null.model, "--url", null.grpc, "--scenario", path, *short, *files)
    assert done.returncode == 3
    assert "open loop, 40/s constant" in done.stdout
    assert "closed loop, 2 in flight" in done.stdout
    assert "FAILED: p99 < 1us" in done.stdout
    shown = page.read_text()
    assert '<section class="verdict bad">' in shown and "Latency over the phases" in shown
    assert "<th>1 a</th>" in shown and "<th>2 b</th>" in shown
    assert '<td class="bad">FAILED</td>' in shown


@pytest.mark.parametrize(
    ("passed", "tone", "shade"), [(True, "good", GREEN), (False, "bad", RED), (None, "open", GREY)]
)
def test_the_page_shades_each_phase_by_what_became_of_it(
    passed: bool | None, tone: str, shade: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "r.jsonl", flights(), END)
    one = {
        "text": "p99 < 9ms",
        "passed": bool(passed),
        "undecided": passed is None,
        "why": "",
        "measured": 1,
        "unit": "",
    }
    document = summarize(path) | {"valid": True, "why": "", "thresholds": [one]}
    found = scenario.load(scenario.find("steady"))
    values = play._document(found, "steady", [judges.Played("a", document, path)], [], None)
    pages.write(values, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert f'<section class="verdict {"bad" if passed is None else tone}">' in html
    drawn = html[html.index("</head>") :]
    assert f'"fillcolor":"{shade}"' in drawn
    assert not [one for one in (GREEN, RED) if one != shade and f'"fillcolor":"{one}"' in drawn]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("rate = 50", "rat = 50"), ["phase 1.rat", "did you mean 'rate'"]),
        (("rate = 50", 'rate = "fast"'), ["phase 1.rate", "'fast'"]),
        (("rate = 50", "rate = [50]"), ["phase 1.rate"]),
        (("rate = 50", "rate = 50\nconcurrency = 1"), ["phase 1 (a)", "both"]),
        (("rate = 50", ""), ["phase 1 (a)", "no rate and concurrency"]),
        (("rate = 50", "rate = 50\nconcurrency = [1, 2]"), ["phase 1 (a)", "both"]),
        (('duration = "2s"', ""), ["phase 1.duration", "is missing"]),
        (('duration = "2s"', 'duration = "0s"'), ["phase 1.duration", "greater than 0"]),
        (("duration = 1", "duration = 0"), ["phase 2.duration", "greater than 0"]),
        (("duration = 1", 'duration = "soon"'), ["phase 2.duration", "'soon'"]),
        (("duration = 1", "duration = true"), ["phase 2.duration"]),
        (("concurrency = 2", 'concurrency = "2"'), ["phase 2.concurrency", "integer"]),
        (("concurrency = 2", "concurrency = []"), ["phase 2.concurrency"]),
        (("concurrency = 2", "concurrency = 0"), ["phase 2.concurrency"]),
        (("concurrency = 2", 'concurrency = 2\narrival = "poisson"'), ["phase 2 (b).arrival"]),
        (('name = "b"', 'name = "a"'), ["phase.name", "twice"]),
        (('name = "b"', 'name = "../b"'), ["phase 2.name"]),
        (('description = "Two phases."', ""), ["description", "is missing"]),
        (('description = "Two phases."', "description = 3"), ["description", "3"]),
        (("[[phase]]", 'verdict = "guilty"\n[[phase]]'), ["verdict", "'guilty'", "saturation"]),
        (("[[phase]]", 'thresholds = ["p99 << 3"]\n[[phase]]'), ["thresholds"]),
        (("[[phase]]", "colour = 3\n[[phase]]"), ["colour"]),
        (("rate = 50", "rate = "), ["is not TOML"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[1].replace("\n", " ") or "left away",
)
def test_a_bad_file_is_named_with_its_field(change: tuple[str, str], words: list[str], tmp_path: Path) -> None:
    text = GOOD.replace(*change, 1)
    assert text != GOOD
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        scenario.load(path)
    message = caught.value.format_message()
    assert str(path) in message
    for word in words:
        assert word in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", 'description = "x"', 'description = "x"\nphase = []', "phase = 3"])
def test_a_scenario_without_phases(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="phase: there is none"):
        scenario.load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("setting", "word"),
    [("duration", "no ="), ("c.duration=3", "called 'c'"), ("duratoin=3", "duratoin"), ("duration=0", "greater than"),
     ("a.concurrency=3", "no phase states a concurrency")],
)  # fmt: skip
def test_a_bad_setting(setting: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=word):
        scenario.load(written(tmp_path, GOOD), [setting])


def test_settings_reach_every_phase_or_one(tmp_path: Path) -> None:
    found = scenario.load(written(tmp_path, GOOD), ["duration=500ms", "b.duration=3", "rate=70%", "b.batch=[1, 2]"])
    assert [phase.duration for phase in found.phase] == [0.5, 3.0]
    assert found.phase[0].rate == "70%"
    assert found.phase[1].rate is None
    assert [phase.name for phase in scenario.phases(found, 1)] == ["a", "b-1"]


def test_what_holds_for_all_phases_is_said_once(tmp_path: Path) -> None:
    found = scenario.load(written(tmp_path, "sequence = 3\nmix = {other = 2}\n" + GOOD))
    assert found.options() == {"sequence": 3, "mix": (("other", 2.0),)}


def test_shares_of_the_saturation_become_rates(tmp_path: Path) -> None:
    text = GOOD.replace("rate = 50", 'rate = "50%"\nprofile = "spike:to=120%,start=0.3"')
    found = scenario.load(written(tmp_path, text))
    assert found.relative
    phase = scenario.resolved(found.phase[0], 200.0)
    assert (phase.rate, phase.profile) == (100.0, "spike:to=240,start=0.3")


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (("--scenario", "stedy"), 2, "did you mean 'steady'"),
        (("--scenario", "steady", "--rate", "3"), 2, "--set rate=VALUE"),
        (("--scenario", "steady", "--html", "none/x.html"), 4, "no such folder"),
        (("--scenario", "steady", "--allow", "5%"), 2, "baseline"),
        (("--scenario", "steady", "--threshold", "p99 < 1s"), 2, "its file"),
        (("--set", "rate=3"), 2, "--scenario"),
        (("--scenario", "saturation", "--pid", "999999999"), 2, "memory"),
        (("--scenario", "saturation", "--output", "."), 4, "is there already"),
    ],
)
def test_options_that_do_not_fit(null: Any, options: tuple[str, ...], code: int, word: str) -> None:
    done = loadtest("run", null.model, "--url", null.http, *options)
    assert done.returncode == code, done.stderr
    assert word in done.stderr


def test_a_server_that_dies_keeps_what_there_is(stand_in: Any, tmp_path: Path) -> None:
    with stand_in(die=60) as server:
        path = written(tmp_path, GOOD.replace("concurrency = 2", "rate = 50"))
        short = (
            "--set",
            "warmup=0s",
            "--set",
            "a.duration=1s",
            "--set",
            "b.duration=5s",
            "--output",
            tmp_path / "s",
            "--json",
        )
        done = loadtest("run", "double", "--url", server.http, "--scenario", path, *short)
    assert done.returncode == 5, done.stderr
    document = json.loads(done.stdout)
    assert document["error"]["exit"] == 5
    assert [phase["name"] for phase in document["phases"]] == ["a", "b"]
    assert document["phases"][0]["requests"]["done"] == 50


def test_an_invalid_scenario_may_be_allowed_and_keeps_the_word(stand_in: Any, tmp_path: Path) -> None:
    short = ("--set", "warmup=0s", "--set", "duration=300ms", "--tolerance", "1e-5")
    # What a scenario asks for is asked of an invalid one too.
    strict = f'thresholds = ["p99 < 1us"]\n{GOOD}'
    for n, (text, code, more) in enumerate(((GOOD, 3, ()), (GOOD, 0, ALLOWED), (strict, 3, ALLOWED))):
        path = written(tmp_path, text)
        with stand_in(wrong=True, since=20) as server:
            command = ("run", "double", "--url", server.http, "--scenario", path, *short, *more)
            done = loadtest(*command, "--output", tmp_path / str(n))
        assert done.returncode == code, done.stderr
        assert "INVALID RUN" in done.stdout


def test_a_stopped_scenario_leaves_a_document_and_no_process(null: Any, tmp_path: Path) -> None:
    path, folder = written(tmp_path, GOOD), tmp_path / "s"
    command = [sys.executable, "-m", "loadtest", "run", null.model, "--url", null.http, "--scenario", path]
    command += ["--set", "a.duration=1s", "--set", "b.duration=60s", "--pid", str(null.pid), "--output", folder]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE)
    while not (folder / "02-b.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"results so far: {folder}" in said.decode()
    document = json.loads((folder / play.DOCUMENT).read_text())
    assert not document["valid"]
    assert [phase["name"] for phase in document["phases"]] == ["a"]
    assert loadtest("report", folder / "02-b.jsonl", "--json").returncode == 0
    # What samples the memory names the pid that it looks at on its command line.
    listed = subprocess.run(["pgrep", "-f", f"loadtest.load.memory {null.pid} "], capture_output=True, text=True)
    assert listed.stdout == ""


def test_memory_of_a_process_and_of_nothing() -> None:
    with watched(str(os.getpid()), every=0.05) as memory:
        held = bytearray(50_000_000)
        time.sleep(2.0)
    del held
    assert len(memory.at)
    assert (memory.used > 50_000_000).all()
    with watched("") as memory:
        pass
    assert memory == Memory("", memory.at, memory.used)
    with pytest.raises(UsageError), watched("http://127.0.0.1:9/metrics"):
        pass


def test_a_folder_with_results_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    found = scenario.load(scenario.find("steady"))
    with pytest.raises(BadInput):
        play.play(found, "steady", lambda *_: {}, tmp_path)
