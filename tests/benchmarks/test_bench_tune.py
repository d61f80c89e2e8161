"""`make bench-tune`: what is measured is kept, figures are read from cells, what misses is not called reached."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.config import model_config
from serve.repository import tree
from serve.simulate.configuration import Configuration

ROOT = Path(__file__).parent.parent.parent
PARTS = ("ledger", "simulation", "best", "default", "cost", "lanes", "analyzer")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    parts = {name: importlib.import_module(f"tuning.{name}") for name in PARTS}
    return SimpleNamespace(tune=importlib.import_module("tune"), **parts)


@pytest.fixture
def ledger(bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench.ledger, "OUTPUT", tmp_path)
    return lambda minutes=1.0: bench.ledger.Ledger("part", minutes)


def test_a_part_goes_on_where_it_was_stopped(bench: SimpleNamespace, ledger: Any) -> None:
    assert ledger().once("a", pow, 2, 3) == 8
    over = ledger(minutes=-1)
    assert over.once("a", pytest.fail) == 8
    assert over.missing(["a", "b"]) == ["b"]
    with pytest.raises(bench.ledger.OutOfTime):
        over.once("b", pytest.fail)


def test_what_is_missed_or_not_measured_is_said(bench: SimpleNamespace) -> None:
    wanted = {name: bench.ledger.Rule("≥", 0.9) for name in ("good", "bad", "none")}
    wanted["low"] = bench.ledger.Rule("≤", 0.1)
    rows = list(bench.tune.verdicts({"good": 0.9, "bad": 0.89, "low": 0.2, "beside": 3.0}, wanted))
    assert [row[0] for row in rows] == ["good", "bad", "none", "low", "beside"]
    assert [row[3] for row in rows] == ["reached", "MISSED", "not measured", "MISSED", ""]


def test_every_part_has_its_figures_and_wants_some(bench: SimpleNamespace) -> None:
    for name in bench.tune.PARTS:
        part = bench.tune.part(name)
        assert part.WANTED and all(callable(getattr(part, key)) for key in ("run", "rows", "figures", "cells"))
        assert list(bench.tune.verdicts(part.figures([]), part.WANTED))


def test_shares_of_cells_are_counted(bench: SimpleNamespace) -> None:
    rows = [{"off": {"throughput": 0.01, "p50": off, "p99": -2 * off}} for off in (0.02, 0.09, -0.11, 0.3)]
    found = bench.simulation.figures(rows)
    assert found["throughput within 5%: share of cells"] == 1
    assert found["p50 within 10%: share of cells"] == 0.5
    assert found["p99 within 20%: share of cells"] == 0.5
    assert (found["p50, cells within 5%"], found["p50, cells within 20%"], found["cells"]) == (0.25, 0.75, 4)


def test_no_cell_is_one_that_the_overheads_are_fitted_with(bench: SimpleNamespace) -> None:
    made = bench.simulation.configurations(Configuration(32))
    assert len(made) >= 12
    assert not any(one.max_batch == 32 and not one.delay for one in made.values())


def test_the_best_of_the_sweep_is_the_best_of_its_last_runs(bench: SimpleNamespace) -> None:
    model = "digits_cnn"
    swept = [{"model": model, "cell": "a", "p99": 3.0, "again": [5.0, 5.2, 4.8]}]
    swept += [{"model": model, "cell": "b", "p99": 4.0, "again": [4.0, 4.2, 4.1]}]
    swept += [{"model": model, "cell": "c", "p99": 9.0, "again": []}]
    mine = {"model": model, "tuned": {"threads": 1}, "runs": 4, "again": [4.3, 4.4, 9.0]}
    found = bench.best.figures([*swept, mine])
    assert found[f"{model}, {bench.best.NEAR}"] == pytest.approx(4.4 / 4.1)
    assert (found[f"{model}, {bench.best.RUNS}"], found[f"{model}, configurations"]) == (4, 3)


def test_tritons_default_says_nothing_of_threads_and_instances(bench: SimpleNamespace) -> None:
    config = tree.config(ROOT / "model_repository", "digits_cnn")
    text = model_config.text(bench.default.tritons(config))
    assert "instance_group" not in text and "intra_op" not in text
    assert "dynamic_batching {\n}" in text and config.instance_group


def test_pairs_are_ratios_within_a_pair(bench: SimpleNamespace, ledger: Any) -> None:
    kept = ledger()
    for pair, (served, beside) in enumerate([(80.0, 100.0), (18.0, 20.0), (5.0, 10.0)]):
        kept.keep(f"mlp: {pair}", {"served": served, "beside": beside})
    found = bench.cost.figures(list(bench.cost.rows(kept)))
    assert found[f"{bench.cost.MLP_RATIO}, median of pairs"] == 0.8


def test_lanes_are_compared_with_the_exact_simulation(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.lanes, "REQUESTS", 20_000)
    found = bench.lanes.figures([bench.lanes.beside(0.5, 2), {"seconds": 9.0, "GiB": 0.3}])
    assert 0 < found["20 replicas, lanes beside exact: p50, largest difference"] < 0.2
    assert found["10,000 replicas, 10 M requests: seconds"] == 9
