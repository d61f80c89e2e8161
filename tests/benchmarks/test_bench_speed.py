"""Benchmarks that ask how much faster: a server of its own in every round; what a file comes to against itself."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMES = ("beside", "ruler", "saturation", "main_job")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


def test_every_round_has_a_server_of_its_own_and_serves_twice(bench: SimpleNamespace) -> None:
    visits: list[str] = []

    def served() -> dict[str, float]:
        visits.append("served")
        return {"rate": 90.0 + len(visits) % 2, "batch": 7.6, "model": 1.5, "server": 0.2, "client": 0.1}

    def alone(batch: int) -> dict[str, float]:
        assert batch == 8
        visits.append("alone")
        return {"rate": 100.0, "model": 2.0}

    found = bench.beside.measure(served, alone)
    assert visits[0] == "served", "a first one says the batch"
    rounds = [sorted(visits[at : at + 3]) for at in range(1, len(visits), 3)]
    assert rounds == [["alone", "served", "served"]] * found["rounds"]
    assert found["ratio"]["low"] <= 0.905 <= found["ratio"]["high"] < 0.92
    assert found["control"]["low"] <= 1 <= found["control"]["high"]
    assert f"served over in process {found['ratio']['value']:.3f} [" in bench.beside.line("fp32", found)
    figures = bench.saturation.figures(found)
    assert figures["at saturation: served over in-process"] == found["ratio"]["value"]
    assert figures["at saturation: cores of the model"] == 1.5
    assert figures["at saturation: the same for each of the model's core-seconds"] == pytest.approx(60.3 / 50, rel=0.02)


def test_served_figures_are_ratios_within_rounds(bench: SimpleNamespace) -> None:
    rounds = {name: {"ratio": {"value": value}} for name, value in (("fp32", 0.93), ("int8", 0.91))}
    load = {"server": {"success": 10, "overhead": 0.05}, "requests": {"done": 10}}
    figures = bench.main_job.served_figures({"rounds": rounds, "moderate": load})
    assert figures["served over in-process, FP32"] == 0.93
    assert figures["server's success count minus the client's"] == 0


@pytest.mark.parametrize(
    ("ratios", "reached"),
    [
        ([(1.0, 0.98, 1.02)] * 10, True),
        ([(1.03, 0.98, 1.08)] * 10, False),
        ([(1.0, 0.98, 1.02)] * 8 + [(1.0, 1.01, 1.02)] * 2, False),
        ([(float("nan"),) * 3] * 10, False),
    ],
)
def test_a_ruler_is_judged_by_coverage_and_mean(
    bench: SimpleNamespace, ratios: list[tuple[float, float, float]], reached: bool
) -> None:
    assert bench.ruler.judged(ratios)["reached"] is reached
