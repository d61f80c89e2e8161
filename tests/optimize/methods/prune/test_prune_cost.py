"""A share of the latency: what counts is what the measured interval shows, on a machine that can measure."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from optimize.judge import measure
from optimize.judge.ruler import CONTROL, Speeds
from optimize.methods.prune import cost
from optimize.model.errors import BusyMachine, NoEffect
from serve.config.target import Target

LUCK = (-1.4, -1, -0.6, -0.3, 0, 0.3, 0.6, 1, 1.4)
WIDTH = 1000
Search = Callable[..., float]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Search:
    """Search for half of the latency of a layer whose time goes with its width, measured with so much noise."""
    exported: dict[Path, nn.Module] = {}

    def export(module: nn.Module, _inputs: object, _outputs: object, path: Path) -> Path:
        exported[path] = module
        return path

    def run(noise: float = 0.0, control: float = 1.0, broken: float = 1.0) -> float:
        def speed(files: Mapping[str, Path], *_: object, **__: object) -> Speeds:
            wide = exported[files["part"]].out_features
            luck = [math.exp(noise * deviation) for deviation in LUCK]
            rounds = {"whole": [1.0] * 9, "part": [broken * wide / WIDTH * value for value in luck]}
            rounds[CONTROL] = [control] * 9
            return Speeds({name: {8: seconds} for name, seconds in rounds.items()}, "whole", took=1.0)  # type: ignore[dict-item]

        monkeypatch.setattr(cost, "export", export)
        monkeypatch.setattr(measure, "speed", speed)
        workload = SimpleNamespace(name="wide", inputs=(), outputs=())
        context: Any = SimpleNamespace(
            workload=workload, target=Target(batch=(1, 8)), scratch=tmp_path, progress=lambda text, fraction: None
        )

        def cut(share: float) -> nn.Module:
            return nn.Linear(1, max(1, round(WIDTH * (1 - share))))

        return cost.share("latency", 0.5, nn.Linear(1, WIDTH), cut, context)

    return run


def test_a_share_counts_where_the_whole_interval_shows_it(search: Search) -> None:
    assert 0.5 <= search() < 0.54
    noise = 0.1
    # Of nine rounds the interval reaches from the smallest ratio to the largest: what is left has to be so much less.
    assert 1 - search(noise) <= 0.5 * math.exp(-1.3 * noise)


@pytest.mark.parametrize("control", [0.8, 1.25, math.nan])
def test_a_machine_that_measures_nothing_prunes_nothing(search: Search, control: float) -> None:
    with pytest.raises(BusyMachine, match="wide before pruning against itself is"):
        search(control=control)


def test_a_speed_of_nan_is_no_share(search: Search) -> None:
    with pytest.raises(NoEffect, match="cannot remove 50% of the latency"):
        search(broken=math.nan)
