import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.judge.summary import load_file
from loadtest.record.results import Results
from loadtest.report import exports
from tests.loadtest.program import loadtest
from tests.loadtest.report.test_report import END, SERVER, flights, write

THRESHOLDS = [
    {"text": "p99 < 20ms", "passed": False, "undecided": False, "why": "", "measured": 500.0, "unit": "ms"},
    {"text": "errors < 10%", "passed": True, "undecided": False, "why": "", "measured": 0.06, "unit": "%"},
]
Run = tuple[Results, dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    results, values = load_file(write(tmp_path / "r.jsonl", flights(), END | {"server": SERVER}))
    return results, values | {"thresholds": THRESHOLDS}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_csv_has_a_row_for_each_request(run: Run, out: Path) -> None:
    exports.csv(run[0], out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    first, last = rows[0], rows[-1]
    assert (first["planned"], first["sent"], first["verdict"], first["model"]) == ("0.000000", "0.000200", "ok", "m")
    assert (last["sent"], last["done"], last["verdict"]) == ("", "", "dropped")


def test_prometheus_can_be_parsed(run: Run, out: Path) -> None:
    exports.prometheus(run[1], out)
    samples = {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "model")): sample.value
        for family in text_string_to_metric_families(out.read_text())
        for sample in family.samples
    }
    assert samples["loadtest_valid",] == 1
    assert samples["loadtest_requests", "done"] == 90
    assert samples["loadtest_latency_seconds", "0.5"] == pytest.approx(0.0092)
    assert samples["loadtest_server_seconds", "queue"] == pytest.approx(0.002)
    assert samples["loadtest_threshold_passed", "p99 < 20ms"] == 0
    assert samples["loadtest_threshold_passed", "errors < 10%"] == 1


def test_junit_has_a_case_for_validity_and_for_each_threshold(run: Run, out: Path) -> None:
    exports.junit(run[1], out)
    suite = ElementTree.parse(out).getroot().find("testsuite")  # noqa: S314 -- we wrote it
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    failed = {case.get("name"): case.find("failure") is not None for case in suite.findall("testcase")}
    assert failed == {"the run is valid": False, "p99 < 20ms": True, "errors < 10%": False}


def test_junit_of_an_invalid_run_whatever_the_server_said(tmp_path: Path, out: Path) -> None:
    values = load_file(write(tmp_path / "r.jsonl", flights(), None))[1]
    exports.junit(values | {"why": "it said \x00 <&>\x1b"}, out)
    failure = ElementTree.parse(out).getroot().find(".//failure")  # noqa: S314 -- we wrote it
    assert failure is not None
    assert "it said ? <&>?" in (failure.get("message") or "")


def test_the_summary_is_appended(run: Run, out: Path) -> None:
    out.write_text("before\n")
    values = run[1] | {"errors": [{"verdict": "error", "text": "a | b <script>\nc", "count": 2}]}
    exports.summary(values, out)
    text = out.read_text()
    assert text.startswith("before\n### ❌ valid run: 90 of 100 requests answered")
    assert "| p99 < 20ms | 500 | ❌ |" in text.replace("&lt;", "<")
    assert "| 2 | a \\| b &lt;script> c |" in text


def test_one_command_writes_all_formats(run: Run, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("html", "csv", "prometheus", "junit", "summary")}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    done = loadtest("report", tmp_path / "r.jsonl", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["valid"]
    assert all(path.stat().st_size > 100 for path in files.values())


def test_several_files_are_put_beside_each_other(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "invalid.jsonl", flights(), None)
    both = (tmp_path / "r.jsonl", tmp_path / "invalid.jsonl")
    done = loadtest("report", *both, "--html", tmp_path / "curve.html", "--json")
    assert done.returncode == 0, done.stderr
    assert [one["valid"] for one in json.loads(done.stdout)["runs"]] == [True, False]
    assert "Latency over throughput" in (tmp_path / "curve.html").read_text()
    assert "INVALID" in loadtest("report", *both).stdout


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("r.jsonl", "r.jsonl", "--csv", "x.csv"), 2, "--csv takes one result file"),
        (("r.jsonl", "--junit", "r.jsonl"), 2, "would overwrite the results"),
        (("r.jsonl", "--csv", "none/x.csv"), 4, "no such folder"),
        ((), 2, "FILE.jsonl"),
    ],
)
def test_what_report_refuses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, said: str
) -> None:
    done = loadtest("report", *(tmp_path / arg if "." in arg else arg for arg in args))
    assert done.returncode == code
    assert said in done.stderr
