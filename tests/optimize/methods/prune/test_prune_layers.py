from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Array, TensorSpec
from optimize.methods import apply as step
from optimize.methods.prune.layers import Layers
from optimize.model.errors import BadRecipe, NoEffect
from optimize.model.structure import Skip
from optimize.predict.module import TorchPredictor
from optimize.runs import recipe
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from serve.config.target import Target

WIDTH = 8


class Block(nn.Module):
    def __init__(self, strength: float, returns: str = "tensor") -> None:
        super().__init__()
        self.change, self.returns = nn.Linear(WIDTH, WIDTH), returns
        with torch.no_grad():
            self.change.weight.mul_(strength)
            self.change.bias.mul_(strength)

    def forward(self, x: torch.Tensor) -> Any:
        x = x + self.change(x).tanh()
        return {"tensor": x, "tuple": (x,), "pair": (x, x)}[self.returns]


class Stack(nn.Module):
    def __init__(self, strengths: list[float], returns: str = "tensor") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(strength, returns) for strength in strengths)
        self.out, self.returns = nn.Linear(WIDTH, 3), returns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            returned = block(x)
            if self.returns == "pair":
                x, _ = returned
            else:
                x = returned[0] if self.returns == "tuple" else returned
        out: torch.Tensor = self.out(x)
        return out


class Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=after // before, padding=1)
        self.pass_by = nn.Conv2d(before, after, 1, stride=2) if after > before else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pass_by(x) + self.conv(x).relu()
        return out


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.second = nn.Sequential(Residual(4, 8), Residual(8, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.second(self.first(x)).mean((2, 3)))
        return out


def given(model: nn.Module, *shape: int) -> Workload:
    spec = TensorSpec("x", "float32", (BATCH, *(shape or (WIDTH,))))

    def batches(seed: int = 0) -> list[Batch]:
        return [Batch({spec.name: spec.generate(np.random.default_rng(seed), batch=16)})]

    def scores(outputs: Any, targets: Any, reference: Any) -> dict[str, Array]:
        return {"score": outputs["y"].mean(1)}

    return Workload(
        *("given", model, (spec,), ("y",), lambda: batches(1), scores),
        calibration=batches,
        higher_is_better={"score": True},
    )


def apply(config: object, workload: Workload, scratch: Path, told: Callable[[str, float], None] | None = None) -> Any:
    progress = told or (lambda text, fraction: None)
    context = Context(workload, workload.build(), Target(cores=1), 0, scratch, progress)
    return step.apply(config, workload.build(), context)


def answer(module: nn.Module, workload: Workload) -> Array:
    batch = next(iter(workload.batches("evaluation")))
    return TorchPredictor(module, workload.outputs).predict(batch.inputs)[workload.outputs[0]]


def removed(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, Skip)]


@pytest.mark.parametrize("returns", ["tensor", "tuple"])
def test_the_block_that_changes_least_goes(returns: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = given(Stack([1.0, 0.5, 0.0, 0.3, 1.0], returns))
    told: list[str] = []
    pruned = apply(Layers(), workload, tmp_path, lambda text, fraction: told.append(text))
    assert removed(pruned) == ["blocks.2"]
    # A block without weights changes nothing, and is no loss.
    assert np.array_equal(answer(pruned, workload), answer(workload.build(), workload))
    assert any("blocks.2 0.0000" in line for line in told)
    assert removed(apply(Layers(remove=2), workload, tmp_path)) == ["blocks.2", "blocks.3"]


def test_what_is_left_can_be_told_or_spread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = replace(given(Stack([1.0] * 6)), calibration=None)
    assert removed(apply(Layers(keep=(0, 5)), workload, tmp_path)) == [f"blocks.{number}" for number in (1, 2, 3, 4)]
    spread = {
        remove: [int(name[-1]) for name in removed(apply(Layers(remove=remove, score="spread"), workload, tmp_path))]
        for remove in (1, 3, 5)
    }
    assert spread == {1: [2], 3: [1, 2, 4], 5: [1, 2, 3, 4, 5]}


def test_a_block_that_changes_the_shape_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = given(ResNet(), 4, 8, 8)
    pruned = apply(Layers(remove=3), workload, tmp_path)
    assert removed(pruned) == ["first.0", "first.1", "second.1"]
    with pytest.raises(BadRecipe) as raised:
        apply(Layers(remove=4), workload, tmp_path)
    assert "second.0: it does not return the shape that it is given" in raised.value.fix
    with pytest.raises(NoEffect, match=r"second\.0 cannot be removed"):
        apply(Layers(keep=(0, 1, 3)), workload, tmp_path)
    assert removed(apply(Layers(container="first"), workload, tmp_path))[0].startswith("first.")


def test_a_block_that_the_model_does_not_run_without_stays(encoder: Workload, tmp_path: Path) -> None:
    # nn.TransformerEncoder reads its first layer's attributes.
    assert removed(apply(Layers(), encoder, tmp_path)) == ["encoder.layers.1"]
    with pytest.raises(BadRecipe) as raised:
        apply(Layers(remove=2), encoder, tmp_path)
    assert "encoder.layers.0: the model's code does not run without it" in raised.value.fix
    torch.manual_seed(0)
    with pytest.raises(BadRecipe, match="remove = 1 of 2 blocks"):
        apply(Layers(), given(Stack([1.0, 1.0], "pair")), tmp_path)


def test_its_bundle_comes_back(encoder: Workload, tmp_path: Path) -> None:
    pruned = apply(Layers(), encoder, tmp_path)
    folder = bundles.save(bundles.Bundle(encoder, pruned), tmp_path / "bundle").folder
    assert folder
    loaded = bundles.load(folder).module
    assert removed(loaded) == ["encoder.layers.1"]
    assert np.array_equal(answer(loaded, encoder), answer(pruned, encoder))


def test_refusals(small: Workload, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe):
        recipe.build(Layers, {"remove": 0}, "prune.layers")
    # As the command line gives it.
    assert recipe.build(Layers, {"keep": ("0", "2")}, "prune.layers").keep == (0, 2)
    workload = given(Stack([1.0, 1.0]))
    for keep in ((2,), (-1,), (0, 1)):
        with pytest.raises(BadRecipe) as raised:
            apply(Layers(keep=keep), workload, tmp_path)
        assert "0 = blocks.0, 1 = blocks.1" in raised.value.fix
    with pytest.raises(BadRecipe, match="remove = 2 of 2 blocks"):
        apply(Layers(remove=2), workload, tmp_path)
    with pytest.raises(NoEffect) as nothing:
        apply(Layers(container="nowhere*"), workload, tmp_path)
    assert "blocks" in nothing.value.fix
    with pytest.raises(NoEffect, match="no blocks in any ModuleList"):
        apply(Layers(), small, tmp_path)
