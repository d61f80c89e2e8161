"""A whole tuning where the truth is known: what is proposed, what is not, and what the next call goes on from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelathe.errors import BadInput, Refused
from serve.simulate import curve_file
from serve.tuning import confirm, page, trial
from serve.tuning.trial import Subject
from serve.tuning.tune import Wanted, tune
from tests.docs.blocks import ROOT
from tests.serve.tuning.world import World, installed, wanted

MODEL = "digits_cnn"


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    shutil.copytree(ROOT / "model_repository" / MODEL, tmp_path / "models" / MODEL)
    config = tmp_path / "models" / MODEL / "config.pbtxt"
    # One thread, which takes three times as long.
    config.write_text(config.read_text().replace('string_value: "2"', 'string_value: "1"'))
    return trial.subject(tmp_path / "models", MODEL)


def tuned(subject: Subject, asked: Wanted) -> dict[str, Any]:
    return tune(subject, asked, lambda _text, _share: None)


def row(values: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in values["confirmed"] if one["name"] == name)
    return found


def test_the_better_configuration_is_proposed_once_it_held_as_predicted(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = installed(monkeypatch, World())
    values = tuned(subject, wanted(tmp_path / "out"))
    assert values["chosen"]["threads"] == 2
    assert values["best"] == values["chosen"]["name"] != "today"
    assert '+    string_value: "2"' in values["diff"]
    assert world.runs[:2] == ["overheads", "today"]
    assert len(world.runs) + 1 <= confirm.RUNS
    for one in values["confirmed"]:
        # What the runs saw had its own luck, and is predicted all the same.
        assert one["off"] < 0.2, one
    assert values["overheads"]["inside_ms"] + values["overheads"]["outside_ms"] == pytest.approx(1.1, abs=0.3)
    assert curve_file.read(tmp_path / "out" / "measured.json").configuration.threads == 2  # type: ignore[union-attr]


def test_traffic_too_thin_to_tell_a_percentile_is_refused_before_anything_runs(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty requests held `p99 < 30ms`."""
    world = installed(monkeypatch, World())
    with pytest.raises(BadInput, match=r"25 s, sends [45]\d requests, and 299 are needed to tell"):
        tuned(subject, wanted(tmp_path / "out", rate=2.0))
    assert not world.runs


def test_a_live_run_of_too_few_requests_holds_nothing(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the rate is looked for, nobody knows before how many come."""
    installed(monkeypatch, World())
    for name in ("REQUESTS", "ENOUGH", "SHORTEST"):
        monkeypatch.setattr(confirm, name, 0.1)
    values = tuned(subject, wanted(tmp_path / "out", goal="throughput"))
    assert all(one["measured"]["requests"] < 299 for one in values["confirmed"])
    assert not any(one["measured"]["holds"] or one["sound"] for one in values["confirmed"])
    assert (values["best"], values["chosen"]) == (None, None)


@pytest.mark.parametrize("goal", ["throughput", "cores"])
def test_the_other_goals(goal: Any, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, World())
    values = tuned(subject, wanted(tmp_path / "out", goal=goal, rate=100.0))
    today, chosen = row(values, "today"), values["chosen"]
    if goal == "cores":
        assert (chosen["threads"] * chosen["instances"], values["diff"]) == (1, "")
    else:
        assert chosen["threads"] == 2
        assert row(values, chosen["name"])["measured"]["rate"] > 1.2 * today["measured"]["rate"]
        assert row(values, chosen["name"])["measured"]["holds"]


def test_what_is_not_as_predicted_is_said_with_its_figures_and_tried_again(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, World(odd={(2, 1): 1.6, (2, 2): 1.6}))
    values = tuned(subject, wanted(tmp_path / "out"))
    off = [one for one in values["confirmed"] if one["off"] > confirm.OFF]
    assert off
    assert all(not one["sound"] and one["measured"]["latency_ms"]["p99"] > 0 for one in off)
    # The live runs have corrected the simulation: what was tried last was as predicted then.
    assert values["confirmed"][-1]["sound"], values["confirmed"]
    assert values["chosen"]["name"] == values["confirmed"][-1]["name"]


def test_todays_stays_where_it_is_as_good_as_the_best(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Live, all others are slower by more than they were measured to be faster.
    installed(monkeypatch, World(odd={(2, 1): 4.0, (2, 2): 8.0, (1, 2): 4.0}))
    values = tuned(subject, wanted(tmp_path / "out"))
    assert values["chosen"]["name"] == "today"
    assert values["diff"] == ""


def test_where_nothing_holds_live_nothing_is_proposed(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The overheads are fitted with one instance of one thread, and do not tell of it.
    installed(monkeypatch, World(odd={(1, 2): 20.0, (2, 1): 20.0, (2, 2): 20.0}))
    values = tuned(subject, wanted(tmp_path / "out", "p99 < 7ms"))
    assert (values["chosen"], values["best"], values["diff"]) == (None, None, "")


def test_an_objective_below_a_call_names_the_lowest_that_is_reachable(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, World())
    with pytest.raises(Refused, match=r"below the time of one call: the lowest reachable p99 is 2\.\d* ms"):
        tuned(subject, wanted(tmp_path / "out", "p99 < 0.5ms"))
    with pytest.raises(Refused, match="below the time of one call"):
        tuned(subject, wanted(tmp_path / "out", "p99 < 0.5ms", "throughput"))


def test_a_rate_that_nothing_holds_names_what_binds_and_the_nearest(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, World())
    with pytest.raises(Refused, match=r"at 50,000/s: p99 < 30ms binds; nearest: threads 2 .*; threads .*; threads "):
        tuned(subject, wanted(tmp_path / "out", "p99 < 30ms, errors < 0.1%", rate=50000))


def test_a_call_that_was_cut_short_is_gone_on_from(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = installed(monkeypatch, World(cut=2))
    asked = wanted(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        tuned(subject, asked)
    assert world.runs == ["overheads", "today"]
    kept = json.loads(asked.measured.read_text())
    assert len(kept["live"]) == 1
    world.cut, world.runs = 99, []
    values = tuned(subject, asked)
    assert {"overheads", "today"}.isdisjoint(world.runs)
    assert [one["name"] for one in values["confirmed"]][:2] == ["today", "best-1"]
    # The next one makes live runs of its own.
    assert json.loads(asked.measured.read_text())["live"] == []
    world.runs = []
    tuned(subject, asked)
    assert world.runs[0] == "today"


def test_other_files_are_measured_anew(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = installed(monkeypatch, World())
    asked = wanted(tmp_path / "out")
    tuned(subject, asked)
    (subject.folder / "other").write_text("other")
    world.runs = []
    tuned(subject, asked)
    assert world.runs[0] == "overheads"
    asked.measured.write_text('{"digest": 3')
    tuned(subject, asked)


def test_progress_goes_forward_and_says_the_best_so_far(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, World())
    told: list[tuple[str, float]] = []
    tune(subject, wanted(tmp_path / "out"), lambda text, share: told.append((text, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert shares[-1] <= 1
    for stage in ("simulating", "live"):
        assert any(text.startswith(stage) and "best so far" in text for text, _ in told)


def test_the_page_shows_what_the_document_holds(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, World())
    values = tuned(subject, wanted(tmp_path / "out"))
    page.write(values, tmp_path / "pages" / "tune.html")
    written = (tmp_path / "pages" / "tune.html").read_text()
    for text in ("Latency over rate, p99", "Where the time goes", "Delay in µs", "today, measured", "intra_op"):
        assert text in written
    assert written.count('class="bar"') == sum(map(len, values["knobs"].values()))
    for name in ("today", values["chosen"]["name"]):
        assert [one["rate"] for one in values["rates"][name]] == sorted(one["rate"] for one in values["rates"][name])
    for one in values["spent"]:
        # The parts add up to what the client saw.
        whole = row(values, one["name"])["measured"]["latency_ms"]["mean"]
        assert sum(one["measured"].values()) == pytest.approx(whole, rel=0.05)
        assert sum(one["predicted"].values()) == pytest.approx(whole, rel=0.25)
