import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from loadtest.mlperf import accuracy, rules
from loadtest.mlperf.rules import RULES, Settings
from loadtest.plan import schedule, traffic
from loadtest.plan.traffic import Part
from loadtest.record.results import OK, VERDICTS, Results
from loadtest.selftest import nullserver
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import Dim, TensorSpec
from tests.loadtest.program import loadtest

ROOT = Path(__file__).parents[3]
SCENARIOS = pytest.mark.parametrize("scenario", RULES)


def loadgen(**asked: Any) -> dict[str, Any]:
    """Run MLCommons' LoadGen; the text of its summary and the latencies and times of its trace."""
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is part of the dev extra")
    command = [sys.executable, str(ROOT / "benchmarks" / "loadgen.py"), json.dumps(asked)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"summary": "\n".join(found["summary"])}


def said(summary: str, pattern: str) -> float:
    """Return the number that LoadGen's summary has in place of the # of a text."""
    found = re.search(re.escape(pattern).replace("\\#", r"(\d+)"), summary)
    assert found, f"{pattern} is not in {summary}"
    return float(found[1])


@pytest.fixture(scope="module")
def null() -> Any:
    with nullserver.running(service=0.0005) as server:
        yield server


def test_early_stopping_needs_what_the_rules_say() -> None:
    # mlperf.conf has the 662 for MultiStream, and LoadGen prints the 64 for SingleStream.
    assert rules.needed(1, 0.9) == 64
    assert rules.needed(1, 0.99) == 662
    assert rules.needed(0, 0.99) == 459


@pytest.mark.parametrize("percentile", [0.9, 0.99])
@pytest.mark.parametrize("queries", [64, 661, 662, 1000, 24_576, 270_336])
def test_so_many_are_discarded_as_may_be(queries: int, percentile: float) -> None:
    over = rules.discarded(queries, percentile)
    if over:
        assert rules.needed(over, percentile) <= queries
    assert rules.needed(over + 1, percentile) > queries


def test_too_few_queries_give_no_estimate() -> None:
    assert rules.estimate(np.arange(63.0), 0.9) is None
    assert rules.estimate(np.arange(64.0), 0.9) == 63.0


@pytest.mark.parametrize("scenario", ["single-stream", "multi-stream"])
def test_the_estimates_are_loadgens_for_the_same_latencies(null: Any, scenario: str) -> None:
    asked = {"duration": 2.0, "queries": 700, "target_qps": 0.0, "target_latency": 0.01, "expected": 0.001}
    found = loadgen(scenario=scenario, url=null.grpc, model=null.model, **asked)
    summary, latencies = found["summary"], np.array(found["latencies_ns"], dtype=float)
    if scenario == "multi-stream":
        # The eight samples of a query are one request, so they end together.
        latencies = latencies.reshape(-1, 8).max(axis=1)
    latencies, share = np.sort(latencies), RULES[scenario].percentile
    assert len(latencies) == said(summary, f"Processed at least {rules.needed(1, share)} queries (#)")
    assert rules.discarded(len(latencies), share) - 1 == said(summary, "Would discard # highest")
    for one in {share, 0.99}:
        assert rules.estimate(latencies, one) == said(
            summary, f"Early stopping {one * 100:.1f}th percentile estimate: #"
        )
    for percent in (50, 90, 95, 97, 99, 99.9):
        stated = said(summary, f"{percent:.2f} percentile latency (ns)   : #")
        assert rules.percentile(latencies, percent / 100) == stated


def test_the_server_scenario_is_judged_as_loadgen_judges_it(null: Any) -> None:
    asked = {"duration": 1.0, "queries": 100, "target_qps": 400.0, "expected": 0.001}
    found = loadgen(scenario="server", url=null.grpc, model=null.model, target_latency=1e-5, **asked)
    over = len(found["latencies_ns"])  # nothing is as fast as that
    more = said(found["summary"], "Would need to run at least # more queries")
    assert rules.needed(over, 0.99) - over == more


@pytest.mark.timed
def test_the_server_scenario_sends_when_loadgen_would() -> None:
    pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is part of the dev extra")
    asked = {"duration": 2.0, "queries": 100, "target_qps": 1000.0, "target_latency": 1.0, "expected": 0.001}
    with nullserver.running() as server:
        found = loadgen(scenario="server", url=server.grpc, model=server.model, **asked)
    theirs = np.diff(np.sort(found["scheduled_us"])) / 1e6
    ours = np.diff(list(schedule.times(1000.0, 2.0, rules.SEED, "poisson")))
    # Both seeds are fixed, so chance has no say in this.
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert len(ours) == pytest.approx(len(theirs), rel=0.1)


@pytest.mark.parametrize("queries", [100, 5000])
def test_the_server_scenario_lasts_for_duration_and_queries(queries: int) -> None:
    shape = rules.options(Settings("server", 10.0, queries, target_qps=100.0), 1, 1)
    due = list(schedule.times(100.0, shape["duration"], shape["seed"], "poisson"))
    assert due[shape["requests"] - 1] >= 10.0
    assert shape["requests"] >= queries
    assert shape["requests"] == queries or due[shape["requests"] - 2] < 10.0


def test_offline_sends_a_tenth_more_than_the_duration_takes() -> None:
    assert rules.options(Settings("offline", 600.0, 24_576, target_qps=100.0), 8, 4)["requests"] == 66_000 / 8
    assert rules.options(Settings("offline", 600.0, 24_576, target_qps=1.0), 8, 4)["requests"] == 24_576 / 8


def test_a_small_data_set_is_enough_for_offline() -> None:
    assert rules.official_rules("offline", 5000).queries == 5000
    assert rules.official_rules("offline", 100_000).queries == 24_576
    assert rules.official_rules("server", 5000).queries == 100


def test_samples_are_drawn_with_replacement_the_same_for_every_worker() -> None:
    part = Part("m", [{}] * 10, drawn=True)
    first, second = (traffic.Chooser([part], rules.SEED).pick for _ in range(2))
    drawn = np.array([first(n) for n in range(20_000)])
    assert [second(n) for n in range(9_999, 0, -1000)] == drawn[9_999:0:-1000].tolist()
    assert np.bincount(drawn, minlength=10).min() > 1800
    assert (np.bincount(drawn) < 2200).all()
    assert len(set(drawn[:10])) < 10  # in turn, all ten would have come


def run(scenario: str, latencies: Any, seconds: float, verdicts: str = OK) -> Results:
    count = len(latencies)
    planned = np.linspace(0, seconds, count)
    verdict = np.full(count, VERDICTS.index(verdicts), np.int8)
    header = {"parts": [{"batch": RULES[scenario].samples}], "plan": {}}
    ones = np.ones(count, np.int32)
    return Results(header, {}, planned, planned, planned + latencies, verdict, ones, ones, ones - 1, [""], [])


@SCENARIOS
def test_a_run_that_keeps_all_rules(scenario: str) -> None:
    official = RULES[scenario]
    settings = Settings(scenario, official.duration, official.queries, 50.0, 0.1, "retinanet")
    figures = rules.figures(settings, run(scenario, np.full(30_000, 0.01), 601.0), data=50_000)
    assert figures["result"] == "VALID"
    assert figures["compliant"], figures["broken"]


@SCENARIOS
@pytest.mark.parametrize(
    ("change", "word"),
    [({"seconds": 599.0}, "duration"), ({"count": 60}, "quer|samples"), ({"data": 0}, "data set"),
     ({"verdicts": "error"}, "without an answer")],
    ids=["short", "few", "generated", "failed"],
)  # fmt: skip
def test_every_broken_rule_is_named(scenario: str, change: dict[str, Any], word: str) -> None:
    what = {"seconds": 601.0, "count": 30_000, "data": 50_000, "verdicts": OK} | change
    settings = Settings(scenario, 1.0, 1, 50.0, 0.1)
    results = run(scenario, np.full(what["count"], 0.01), what["seconds"], what["verdicts"])
    figures = rules.figures(settings, results, what["data"])
    assert not figures["compliant"]
    assert any(re.search(word, text) for text in figures["broken"]), figures["broken"]


@pytest.mark.parametrize(
    ("latency", "benchmark", "kept"),
    [(0.1, "retinanet", True), (0.1, "", False), (0.015, "resnet50", True), (10.0, "resnet50", True)],
)
def test_only_mlperfs_own_bounds_keep_its_rules(latency: float, benchmark: str, kept: bool) -> None:
    settings = Settings("server", 600.0, 100, 50.0, latency, benchmark)
    figures = rules.figures(settings, run("server", np.full(30_000, 0.01), 601.0), 50_000)
    assert figures["result"] == "VALID"
    assert figures["compliant"] == kept
    assert kept or figures["broken"] == ["the bound of the latency is MLPerf's own (--benchmark): no"]
    if benchmark == "resnet50":
        # Within a generous bound of one's own is not within MLPerf's.
        slow = rules.figures(settings, run("server", np.full(30_000, 0.016), 601.0), 50_000)
        assert not slow["compliant"]
        assert any("asked at most 15 ms" in text for text in slow["broken"])


def test_the_bounds_are_those_that_loadgen_carries() -> None:
    library = pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is part of the dev extra")
    config = Path(library.__file__).read_bytes()
    stated = re.findall(rb"([a-z0-9_.-]+)\.Server\.target_latency = (\d+)", config)
    assert {name.decode(): int(limit) / 1e3 for name, limit in stated if limit != b"0"} == rules.BOUNDS


def test_a_slow_server_is_invalid() -> None:
    latencies = np.where(np.arange(30_000) % 50 == 0, 0.2, 0.01)
    figures = rules.figures(Settings("server", 600.0, 100, 50.0, 0.1), run("server", latencies, 601.0), 50_000)
    assert figures["result"] == "INVALID"
    assert [text.partition(":")[0] for text in figures["unmet"]] == [
        "latency at 99 %",
        "early stopping, 600 queries over the latency",
    ]


@SCENARIOS
def test_a_shortened_run_says_first_that_it_is_not_compliant(null: Any, scenario: str, tmp_path: Path) -> None:
    short = (
        "--duration",
        "500ms",
        "--queries",
        100,
        "--warmup",
        "100ms",
        "--target-qps",
        200,
        "--target-latency",
        "1s",
    )
    done = loadtest(
        "mlperf", null.model, "--url", null.http, "--scenario", scenario, *short, "--output", tmp_path / "m"
    )
    assert done.stdout.startswith("NOT COMPLIANT with MLPerf's rules:\n")
    assert "asked at least 600 s" in done.stdout
    document = json.loads((tmp_path / "m" / "mlperf.json").read_text())
    assert done.returncode == (0 if document["result"] == "VALID" else 3), done.stderr
    assert document["metric"]["value"] > 0
    log = (tmp_path / "m" / "mlperf_log_summary.txt").read_text()
    assert f"Scenario : {RULES[scenario].name}" in log
    assert f"Result is : {document['result']}" in log


def test_accuracy_against_labels_and_against_a_version(endpoint: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(21, 4)).astype(np.float32)
    right = (x @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 10)).argmax(axis=1)
    labels = np.where(np.arange(21) < 20, right, (right + 1) % 3)
    np.savez(tmp_path / "d.npz", x=x)
    np.save(tmp_path / "l.npy", labels)
    common = ("mlperf", "tiny", "--url", endpoint.grpc, "--scenario", "offline", "--mode", "accuracy",
              "--data", tmp_path / "d.npz", "--batch", 8, "--json")  # fmt: skip
    good = loadtest(*common, "--labels", tmp_path / "l.npy", "--reference", 0.95, "--output", tmp_path / "a")
    document = json.loads(good.stdout)
    assert good.returncode == 0, good.stderr
    assert document["metric"]["value"] == pytest.approx(20 / 21)
    assert document["gates"] == {"99%": True, "99.9%": True}
    bad = loadtest(*common, "--labels", tmp_path / "l.npy", "--reference", 0.97, "--output", tmp_path / "b")
    assert bad.returncode == 3
    assert json.loads(bad.stdout)["gates"] == {"99%": False, "99.9%": False}
    same = loadtest(*common, "--reference-version", 1, "--gate", "99.9%", "--output", tmp_path / "c")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["ratio"] == 1.0


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [
        (("--scenario", "server"), 2, "target-qps"),
        (("--scenario", "server", "--target-qps", "-1"), 2, "--target-qps"),
        (("--scenario", "single-stream", "--duration", "0s"), 2, "duration"),
        (("--scenario", "single-stream", "--batch", "2"), 2, "--batch"),
        (("--scenario", "offline", "--mode", "accuracy"), 2, "reference"),
        (("--scenario", "offline", "--mode", "accuracy", "--reference-version", "1"), 2, "--data"),
    ],
)
def test_a_wrong_option_is_one_line(null: Any, wrong: tuple[str, ...], code: int, word: str, tmp_path: Path) -> None:
    done = loadtest("mlperf", null.model, "--url", null.http, *wrong, "--output", tmp_path / "m")
    assert done.returncode == code
    assert word in done.stderr
    assert not (tmp_path / "m").exists()


def test_a_model_that_takes_no_eight_samples(tmp_path: Path) -> None:
    small = TensorSpec("x", "float32", (Dim("batch", 1, 1, 4), 3))
    with nullserver.running(inputs=[small]) as server:
        done = loadtest(
            "mlperf", server.model, "--url", server.http, "--scenario", "multi-stream", "--output", tmp_path / "m"
        )
    assert done.returncode == 2
    assert "8 samples, where the model takes 4" in done.stderr


def test_labels_and_outputs_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", np.zeros(3))
    for path in (tmp_path / "none.npy", tmp_path / "l.npy", Path(__file__)):
        with pytest.raises(BadInput):
            accuracy.read_labels(path, 3)
    with pytest.raises(UsageError):
        Settings("server", 1.0, 0, 1.0)
