import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter

from loadtest.calls import run as calls
from loadtest.cli import main
from loadtest.judge import baseline
from loadtest.judge.baseline import Baseline
from loadtest.judge.compare import NONE_SHOWN, UNDECIDED, compare, differences, read_side, with_run
from loadtest.judge.summary import summarize
from loadtest.plan.plan import Plan
from loadtest.record.results import ERROR, OK, VERDICTS, Flight, Results, Writer
from modelathe.errors import BadInput

END = {"end": 30.0, "client_cpu": 0.2, "client_cores": 1, "gone": False, "errors": []}


def header(model: str = "m", **plan: Any) -> dict[str, Any]:
    written = asdict(Plan("grpc://h:1", **{"duration": 30.0, "concurrency": 4} | plan))
    part = {"model": model, "version": "3", "payloads": 1, "batch": 2, "tolerance": None, "weight": 1.0}
    part["shapes"] = {"x": [2, 4]}
    return {"plan": written, "parts": [part], "model": model, "model_version": "3", "url": "grpc://h:1"}


def made(seed: int, slower: float = 1.0, errors: float = 0.0, count: int = 6000, **plan: Any) -> Results:
    """A run whose busy moments last: the logarithms of the latencies follow each other as AR(1)."""
    rng = np.random.default_rng(seed)
    noise = lfilter([1.0], [1.0, -0.95], rng.normal(0, 0.1, count))
    latency = 0.01 * slower * np.exp(noise + rng.normal(0, 0.3, count))
    sent = np.sort(rng.uniform(0, 29.9, count))
    verdict = np.where(rng.random(count) < errors, VERDICTS.index(ERROR), VERDICTS.index(OK)).astype(np.int8)
    nothing = np.zeros(count, np.int32)
    return Results(header(**plan), END, sent, sent, sent + latency, verdict, nothing, nothing + 1, nothing, [""], [])


def side(*runs: Results) -> list[Baseline]:
    return [baseline.of(run, Path(f"{place}.jsonl")) for place, run in enumerate(runs)]


def write(path: Path, run: Results) -> Path:
    with Writer(path, run.header) as writer:
        for n in range(len(run.sent)):
            times = (float(run.planned[n]), 0, float(run.sent[n]), float(run.done[n]))
            writer.add(Flight(n, *times, VERDICTS[run.verdict[n]]))
        writer.finish(run.end)
    return path


def verdicts(values: dict[str, Any]) -> dict[str, str]:
    return {name: metric["verdict"] for name, metric in values["metrics"].items()}


def test_equal_runs_are_seldom_called_different() -> None:
    found = []
    for seed in range(40):
        values = compare(side(made(2 * seed)), side(made(2 * seed + 1)))["metrics"]
        found += [values[name]["verdict"] for name in ("p50", "p90", "p99")]
    # One in twenty is the aim; a bootstrap of the tail from ten stretches of time comes near it, no more.
    assert sum(verdict not in (NONE_SHOWN, UNDECIDED) for verdict in found) / len(found) <= 0.1
    assert found.count(UNDECIDED) / len(found) <= 0.1


@pytest.mark.parametrize("runs", [1, 4])
def test_a_difference_is_shown_with_its_size(runs: int) -> None:
    a, b = side(*map(made, range(runs))), side(*(made(100 + n, slower=1.3) for n in range(runs)))
    values = compare(a, b)
    for name in ("p50", "p90", "p99"):
        metric = values["metrics"][name]
        assert metric["verdict"] == "slower"
        assert metric["low"] < 1.3 < metric["high"]
        assert metric["effect"] == pytest.approx(metric["b"] / metric["a"])
    assert verdicts(compare(b, a))["p50"] == "faster"
    assert any("one run on a side" in note for note in values["notes"]) == (runs == 1)


def test_the_figures_are_those_of_the_report() -> None:
    [run] = side(made(0, errors=0.02))
    metrics = compare([run], [run])["metrics"]
    for name in ("p50", "p90", "p99"):
        assert metrics[name]["a"] == pytest.approx(run.document["latency_ms"][name], rel=baseline.BIN)
    assert metrics["throughput"]["a"] == pytest.approx(run.document["rate"]["achieved"])
    requests = run.document["requests"]
    assert metrics["errors"]["a"] == pytest.approx(100 * requests["failed"] / requests["planned"])
    assert set(verdicts(compare([run], [run])).values()) == {NONE_SHOWN}


def test_throughput_and_errors_have_words_of_their_own() -> None:
    values = compare(side(made(0)), side(made(1, count=3000, errors=0.05)), allow=0.1)
    assert verdicts(values)["throughput"] == "slower"
    assert verdicts(values)["errors"] == "more"
    assert not values["metrics"]["errors"]["passed"]
    assert verdicts(compare(side(made(1, count=3000, errors=0.05)), side(made(0))))["errors"] == "fewer"


def test_what_is_allowed_fails_only_where_more_is_shown() -> None:
    a, b = side(made(0)), side(made(100, slower=1.3))
    assert compare(a, b)["passed"]
    assert compare(a, b, allow=0.5)["passed"]
    failed = compare(a, b, allow=0.05)
    assert not failed["passed"]
    assert not failed["metrics"]["p50"]["passed"]
    assert failed["metrics"]["throughput"]["passed"]


def test_a_baseline_is_small_and_says_the_same_as_the_run(tmp_path: Path) -> None:
    [run], other = side(made(0, errors=0.01)), side(made(7, slower=1.1))
    baseline.write(run, tmp_path / "base.json")
    assert (tmp_path / "base.json").stat().st_size < 100_000
    assert list(tmp_path.iterdir()) == [tmp_path / "base.json"]
    again = baseline.read(tmp_path / "base.json")
    assert compare([again], other)["metrics"] == compare([run], other)["metrics"]


@pytest.mark.parametrize(
    ("plan", "errors", "compared", "says"),
    [
        ({}, 0.0, False, ""),
        ({"thresholds": ["p99 < 1us"]}, 0.0, False, "leave away the --threshold"),
        ({"thresholds": ["p99.9 < 9s"], "duration": 1.0}, 0.0, False, "leave away the --threshold"),
        ({}, 0.0, True, "or --baseline that failed"),
        ({}, 0.05, False, "say how many may fail"),
    ],
)
def test_only_a_run_that_passes_becomes_a_baseline(
    plan: dict[str, Any], errors: float, compared: bool, says: str, tmp_path: Path
) -> None:
    """One that was invalid and allowed to be does not; and what was kept before stays."""
    count = 6000 if "duration" not in plan else 200
    path = write(tmp_path / "r.jsonl", made(0, slower=1.5 if compared else 1.0, errors=errors, count=count, **plan))
    values, kept = summarize(path), tmp_path / "kept.json"
    if compared:
        values["comparison"] = with_run(side(made(1)), path, allow=0.05)
    kept.write_text("before")
    failure = calls.save(values, path, kept, calls.failed(values, path, allow_invalid=True))
    assert (failure.exit_code if failure else 0) == (3 if says else 0)
    assert (kept.read_text() == "before") == bool(says)
    assert [says in note for note in values["notes"] if "was not written" in note] == [True] * bool(says)


def test_other_loads_and_models_are_named() -> None:
    same = side(made(0), made(1, duration=20.0, warmup=5.0))
    assert differences(same[:1], same[1:]) == []
    for changed in ({"concurrency": 8}, {"think": 0.5}, {"model": "n"}, {"rate": 5.0, "concurrency": None}):
        found = differences(side(made(0)), side(made(1, **changed)))
        assert any(key in text for key in changed for text in found), changed


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    a = write(tmp_path / "a.jsonl", made(0, count=2000))
    b = write(tmp_path / "b.jsonl", made(1, slower=1.5, count=2000))
    other = write(tmp_path / "c.jsonl", made(2, concurrency=9, count=500))
    (tmp_path / "many").mkdir()
    for seed in (3, 4, 5):
        write(tmp_path / "many" / f"{seed}.jsonl", made(seed, count=500))
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(a.read_text().splitlines(keepends=True)[:-1]))

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*map(str, args)])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), " ".join(out.split()), err  # where a line ends depends on the folder's name

    code, out, _ = run("compare", a, b)
    assert code == 0
    assert "slower" in out
    code, out, _ = run("compare", a, b, "--allow", "5%", "--json")
    values = json.loads(out)
    assert code == 3
    assert values["error"]["kind"] == "Refused"
    assert values["metrics"]["p50"]["effect"] == pytest.approx(1.5, rel=0.1)
    code, _, err = run("compare", a, other)
    assert code == 4
    assert "concurrency is 4" in err
    assert "--anyway" in err
    assert run("compare", a, other, "--anyway")[0] == 0
    assert run("compare", a, tmp_path / "many")[0] == 0
    code, out, err = run("compare", a, broken)
    assert code == 3
    assert "interrupted" in err
    assert "INVALID RUN" in out
    assert run("compare", a, b, "--allow", "lots")[0] == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for name, content in {"empty": "", "half.json": '{"format": 1, "blocks": 30}\n', "text": "hello\n"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(BadInput, match=name):
            baseline.read(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for missing in ("folder", "nowhere"):
        with pytest.raises(BadInput, match=missing):
            read_side(tmp_path / missing)


def test_a_run_whose_input_is_called_blocks_is_no_baseline(tmp_path: Path) -> None:
    run = made(0, count=300)
    run.header["parts"][0]["shapes"] = {"blocks": [1, 4], "run": [1]}
    path = write(tmp_path / "run.jsonl", run)
    assert baseline.read(path).document["requests"]["done"] == 300
