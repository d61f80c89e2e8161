"""`loadtest.run` and `loadtest.capacity`, against the real server."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import loadtest
from loadtest.calls import keywords
from loadtest.cli import main
from loadtest.judge import validity
from modelathe.errors import MachineError, Refused, ServerAbsent, UsageError
from serve.server.endpoint import Endpoint
from tests.conftest import TINY


@pytest.fixture(autouse=True)
def _patient() -> Iterator[None]:
    """How late a machine that does other things lets the client send is not these tests' matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validity, "LARGEST_LAG_MS", 1e4)
        patch.setattr(validity, "BUSIEST_CLIENT", 1e4)
        yield


def test_a_run_carries_the_commands_document(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = loadtest.run(
        TINY,
        endpoint.grpc,
        duration=1,
        warmup="100ms",
        concurrency=2,
        threshold="errors < 1%",
        output=tmp_path / "a.jsonl",
        html=tmp_path / "a.html",
        quiet=True,
    )
    assert found.passed
    assert found.check() is found
    assert found.valid
    assert found.requests["done"] == found.document["requests"]["done"] > 0
    assert found.results == tmp_path / "a.jsonl"
    assert found.latency_ms["p50"] > 0
    asked = ["run", TINY, "--url", endpoint.grpc, "--duration", "500ms", "--warmup", "0s", "--json"]
    with pytest.raises(SystemExit):
        main.main([*asked, "--output", str(tmp_path / "b.jsonl")])
    assert set(json.loads(capsys.readouterr().out)) == set(found.document)


def test_a_cell_shows_the_figures_of_the_page(endpoint: Endpoint, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = loadtest.run(TINY, endpoint.http, duration=1, output=tmp_path / "a.jsonl", html=page, quiet=True)
    shown, written = found._repr_html_(), page.read_text()
    tiles = re.findall(r'class="figure"><b class="[^"]*">([^<]*)</b>', written)
    assert len(tiles) == 6
    assert all(f">{tile}</td>" in shown for tile in tiles)
    assert "color" not in shown
    table = found.to_pandas()
    assert isinstance(table, pd.DataFrame)
    assert table.set_index("ms").loc["latency", "p99"] == found.latency_ms["p99"]


def test_a_threshold_that_does_not_hold_is_an_answer(endpoint: Endpoint, tmp_path: Path) -> None:
    asked = {"duration": 1.0, "threshold": ["p50 < 0.0001ms"], "output": tmp_path / "a.jsonl", "quiet": True}
    found = loadtest.run(TINY, endpoint.grpc, **asked)  # type: ignore[call-overload]
    assert not found.passed
    assert found.valid
    with pytest.raises(Refused, match=r"p50 < 0\.0001ms") as refused:
        found.check()
    assert refused.value.partial is found.document


def test_a_baseline_is_kept_and_compared_with(endpoint: Endpoint, tmp_path: Path) -> None:
    kept = tmp_path / "baseline.json"
    first = loadtest.run(
        TINY, endpoint.grpc, duration=2, rate=50, output=tmp_path / "a.jsonl", save_baseline=kept, quiet=True
    )
    assert first.passed
    again = loadtest.run(
        TINY, endpoint.grpc, duration=2, rate=50, output=tmp_path / "b.jsonl", baseline=kept, allow=0.99, quiet=True
    )
    assert again.document["comparison"]


def test_a_scenario_has_a_row_for_each_phase(endpoint: Endpoint, tmp_path: Path) -> None:
    played = loadtest.run(
        TINY,
        endpoint.grpc,
        scenario="steady",
        set=["duration=1s", "rate=20"],
        output=tmp_path / "steady",
        quiet=True,
    )
    assert played.results == tmp_path / "steady"
    assert list(played.to_pandas()["phase"]) == [phase["name"] for phase in played.document["phases"]]
    assert played.document["scenario"] in played._repr_html_()
    with pytest.raises(UsageError, match="--rate and --scenario are both given"):
        loadtest.run(TINY, endpoint.grpc, scenario="steady", rate=20)


def test_what_is_wrong_is_said_before_any_load() -> None:
    url = "grpc://127.0.0.1:9"
    with pytest.raises(UsageError, match="there is no option 'durations'") as wrong:
        loadtest.run(TINY, url, durations=3)  # type: ignore[call-overload]
    assert wrong.value.fix == "did you mean 'duration'?"
    for asked in ({"duration": "3 weeks"}, {"rate": math.inf}, {"allow": 5}, {"compression": "zip"}, {"workers": "a"}):
        with pytest.raises(UsageError, match=f"^{next(iter(asked))} = "):
            loadtest.run(TINY, url, **asked)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="the probes decide on rate"):
        loadtest.capacity(TINY, url, "p99 < 20ms", rate=20)
    with pytest.raises(ServerAbsent):
        loadtest.run(TINY, url)


def test_python_values_are_what_the_command_line_makes_of_its_words() -> None:
    words = ["--duration", "2s", "--rate", "max", "--mix", "other=2", "--header", "a: b", "--shape", "x:3,4"]
    words += ["--begin-at", "2026-11-22T21:00:00Z", "--data", "in.npz", "--fresh"]
    context = keywords._declared.make_context("loadtest", ["--url", "grpc://h:1", *words])
    values = keywords.gather(
        "grpc://h:1",
        {
            "duration": 2,
            "rate": "max",
            "mix": {"other": 2.0},
            "header": {"a": "b"},
            "shape": {"x": (3, 4)},
            "begin_at": "2026-11-22T21:00:00Z",
            "data": Path("in.npz"),
            "fresh": True,
            "seed": None,
        },
    )
    assert values == context.params | {"mix": values["mix"]}
    assert list(values["mix"]) == list(context.params["mix"])


@pytest.mark.timed
def test_a_capacity_has_a_row_for_each_probe(endpoint: Endpoint, tmp_path: Path) -> None:
    found = loadtest.capacity(
        TINY, endpoint.grpc, "p99 < 1s", duration=0.6, budget=4, start=50, output=tmp_path / "c", quiet=True
    )
    assert found.rate == pytest.approx(found.document["rate"], nan_ok=True)
    assert len(found.to_pandas()) == len(found.document["probes"]) > 0
    assert found.passed == math.isfinite(found.rate)
    assert "requests per second" in found._repr_html_()


def test_without_pandas_the_line_that_installs_it(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = loadtest.run(TINY, endpoint.grpc, duration=0.5, warmup=0, output=tmp_path / "a.jsonl", quiet=True)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MachineError, match="a table needs pandas"):
        found.to_pandas()
