"""What a plan is made from: objectives, arrivals, files of measured times, prices, and configurations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from modelathe.errors import BadInput, UsageError
from serve.config import model_config
from serve.planning import arrivals, objective, prices, served
from serve.repository import tree
from serve.simulate import curve_file
from serve.simulate.configuration import Configuration, Level
from tests.docs.blocks import ROOT
from tests.serve.planning.curves import drawn, written


def test_an_objective_is_judged_condition_by_condition() -> None:
    found = objective.parse("p99 < 20ms, mean <= 1s, errors < 0.1%")
    judged = found.judge({"p99": 25.0, "mean": 800.0}, 10_000, failed=5)
    assert [(one.text, one.measured, one.unit, one.passed) for one in judged] == [
        ("p99 < 20ms", 25.0, "ms", False),
        ("mean <= 1s", 0.8, "s", True),
        ("errors < 0.1%", 0.05, "%", True),
    ]
    assert max(judged, key=lambda one: one.excess).text == "p99 < 20ms"
    assert found.requests == 299


@pytest.mark.parametrize(
    "text",
    [
        *("p99 > 20ms", "p99 < 0ms", "errors == 0", "errors < 3", "max < 1s", "rate < 5", "dropped < 1%"),
        *("lag p99 < 1ms", "service p99 < 4ms", "p98 < 20ms", "p99 < 20", "", "p99 < nanms"),
    ],
)
def test_what_no_simulation_can_hold_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        objective.parse(text)


def test_nothing_is_true_of_a_figure_that_is_none() -> None:
    judged = objective.parse("p99 < 20ms").judge({"p99": float("nan")}, 0)
    assert not judged[0].passed


@pytest.mark.parametrize(
    ("text", "variation"), [("poisson", 1.0), ("uniform", 0.0), ("gamma:2", 2.0), ("gamma:0.5", 0.5)]
)
def test_gaps_vary_as_asked(text: str, variation: float) -> None:
    gaps = arrivals.parse(text).gaps(200_000, 0, np.random.default_rng(0))
    assert gaps.mean() == pytest.approx(1, rel=0.02)
    assert gaps.std() == pytest.approx(variation, rel=0.03)


@pytest.mark.parametrize(("text", "variation"), [("poisson", 1.0), ("uniform", 0.5**0.5), ("gamma:2", 2.5**0.5)])
def test_half_of_the_requests_by_chance(text: str, variation: float) -> None:
    """A geometric number of gaps, half of them 1: the squared variation is half of what it was, and half of 1."""
    gaps = arrivals.parse(text).gaps(200_000, 0, np.random.default_rng(0), share=0.5)
    assert gaps.mean() == pytest.approx(1, rel=0.02)
    assert gaps.std() == pytest.approx(variation, rel=0.03)


@pytest.mark.parametrize("text", ["", "gamma", "gamma:0", "gamma:-1", "gamma:nan", "gamma:99", "constant", "poisson:2"])
def test_arrivals_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--arrival"):
        arrivals.parse(text)


def test_a_trace_is_replayed_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text("5\n6\n8\n9.0\n")
    found = arrivals.read(tmp_path / "trace.txt")
    # Three gaps in 4 s, and their mean behind the last request.
    assert found.rate == pytest.approx(4 / (4 + 4 / 3))
    gaps = found.gaps(6, 3, np.random.default_rng(0)) / found.rate
    assert gaps == pytest.approx([4 / 3, 1, 2, 1, 4 / 3, 1])
    thinned = found.gaps(40_000, 0, np.random.default_rng(0), share=0.1)
    assert thinned.mean() == pytest.approx(1, rel=0.02)
    assert thinned.std() == pytest.approx((0.1 * found.variation**2 + 0.9) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("lines", "said"),
    [("3\n", "holds 1 request, and 299"), ("3\n4\n", "holds 2 requests"), ("3\n" * 400, "of one moment")],
)
def test_a_trace_that_tells_too_little(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text(lines)
    with pytest.raises(BadInput, match=said):
        arrivals.read(tmp_path / "trace.txt", objective.parse("p99 < 1s").requests)


def test_measured_times_are_written_and_read_again(tmp_path: Path) -> None:
    found = curve_file.read(written(tmp_path / "a.json", together=[1, 1.5], beside="kept out"))
    assert found.configuration == Configuration(32, threads=2)
    (tmp_path / "b.json").write_text(json.dumps(found.document()))
    assert curve_file.read(tmp_path / "b.json") == found
    curve, wanted = found.curve(), drawn()
    assert (curve.together, curve.inside, curve.outside) == ((1.0, 1.5), 0.0002, 0.0005)
    assert all((curve.calls[size] == wanted.calls[size]).all() for size in wanted.calls)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format"),
        ({"calls": None}, "calls"),
        ({"calls": {}}, "calls"),
        ({"calls": {"0": [1.0]}}, "calls.0"),
        ({"calls": {"a": [1.0]}}, "calls.a"),
        ({"calls": {"1": []}}, "calls.1"),
        ({"calls": {"1": [0.0]}}, "calls.1.0"),
        ({"calls": {"1": [float("nan")]}}, "calls.1.0"),
        ({"calls": {"1": [float("inf")]}}, "calls.1.0"),
        ({"cores": 0}, "cores"),
        ({"together": []}, "together"),
        ({"inside": -1}, "inside"),
        ({"configuration": {"threads": 1}}, "max_batch"),
    ],
)
def test_a_file_that_holds_no_measured_times_names_the_key(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        curve_file.read(written(tmp_path / "a.json", **change))


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b"{"])
def test_a_file_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"no such file|not JSON|no measured times"):
        curve_file.read(tmp_path / "a.json")


LIST = '[[machine]]\nname = "c2"\ncores = 2\nprice = 0.1\n[[machine]]\nname = "c8"\ncores = 8\nprice = 0.36\n'


def priced(tmp_path: Path, text: str) -> Path:
    (tmp_path / "prices.toml").write_text(text)
    return tmp_path / "prices.toml"


def test_what_a_million_requests_cost(tmp_path: Path) -> None:
    path, measured = priced(tmp_path, LIST), curve_file.read(written(tmp_path / "a.json"))
    machines = prices.read(path)
    assert prices.chosen(machines, measured, "", path).name == "c2"
    found = prices.cost(prices.chosen(machines, measured, "c8", path), measured, 9, 1000.0)
    # Four replicas of two cores fit one machine.
    assert (found["replicas_per_machine"], found["machines"]) == (4, 3)
    assert found["per_hour"] == pytest.approx(3 * 0.36)
    assert found["per_million"] == pytest.approx(3 * 0.36 / 3.6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LIST.replace("price = 0.36\n", ""), "the machine 'c8' has no price"),
        (LIST.replace("0.36", "-1"), "the machine 'c8': price"),
        (LIST.replace("0.36", "nan"), "the machine 'c8': price"),
        (LIST.replace('name = "c8"\n', ""), "machine 2 has no name"),
        ("", "lists no machine"),
        ("machine = 3", "lists no machine"),
        ("[[machine", "not TOML"),
    ],
)
def test_a_list_of_prices_that_lacks_something_names_the_machine(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        prices.read(priced(tmp_path, text))


@pytest.mark.parametrize(
    ("measured", "name", "said"),
    [
        ({}, "c9", "no price for the machine 'c9'"),
        ({"machine": ""}, "", "which of"),
        ({"cores": 4}, "c2", "has 2 cores"),
    ],
)
def test_a_machine_that_has_no_price(measured: dict[str, Any], name: str, said: str, tmp_path: Path) -> None:
    path, times = priced(tmp_path, LIST), curve_file.read(written(tmp_path / "a.json", **measured))
    with pytest.raises(BadInput, match=said):
        prices.chosen(prices.read(path), times, name, path)


def test_the_configuration_of_the_committed_model() -> None:
    found = served.configuration(tree.config(ROOT / "model_repository", "digits_cnn"))
    assert found == Configuration(32, threads=2)
    assert not list(served.left_out(found))


def test_a_configuration_with_everything() -> None:
    text = """
    max_batch_size: 8  input { name: "x" dims: -1 }  instance_group { count: 2 }  instance_group { count: 1 }
    dynamic_batching {
      preferred_batch_size: 4  max_queue_delay_microseconds: 500  priority_levels: 2  default_priority_level: 1
      default_queue_policy { max_queue_size: 9 default_timeout_microseconds: 2000 }
      priority_queue_policy { key: 2 value { timeout_action: DELAY allow_timeout_override: true } }
    }
    """
    found = served.configuration(model_config.parse(text, where="config.pbtxt"))
    levels = (Level(9, 0.002), Level(0, 0.0, delayed=True, override=True))
    assert found == Configuration(8, True, 0.0005, (4,), 3, False, levels, 1)
    assert len(list(served.left_out(found))) == 4


def test_without_batching_each_request_is_a_call() -> None:
    assert not served.configuration(ModelConfig(max_batch_size=8)).dynamic
    ensemble = ModelConfig(name="e")
    ensemble.ensemble_scheduling.step.add()
    with pytest.raises(BadInput, match="ensemble scheduling"):
        served.configuration(ensemble)
