"""Weights that a quantizer cannot take: they stay float, are named with their share, and may not be most of all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.half import Half
from optimize.methods.quantize.left import floats, told
from optimize.methods.quantize.mixed import Mixed
from optimize.methods.quantize.static import Static
from optimize.methods.quantize.weight_only import WeightOnly
from optimize.methods.table import METHODS
from optimize.model.errors import NoEffect
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target
from tests.optimize.conftest import Optimize
from tests.optimize.methods.quantize.test_quantize import distance, workload

ROW = TensorSpec("input", "float32", (BATCH, 32), (-1, 1))
IMAGE = TensorSpec("input", "float32", (BATCH, 3, 8, 8), (-1, 1))
STEPS = TensorSpec("input", "float32", (BATCH, 7, 32), (-1, 1))


class Experts(nn.Module):
    """A stack of weights [4, 32, 48] beside dense layers of `width`, which a product or an einsum reads."""

    def __init__(self, width: int, einsum: bool = False) -> None:
        super().__init__()
        self.experts, self.einsum = nn.Parameter(torch.randn(4, 32, 48) / 6), einsum
        self.wide, self.out = nn.Linear(32, width), nn.Linear(48 + width, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.einsum:
            x = torch.einsum("bi,eio->bo", input, self.experts)
        else:
            x = (input[:, None, None] @ self.experts).sum((1, 2))
        return self.out(torch.cat([x, self.wide(input)], 1).relu())


class Pooled(nn.Module):
    """Attention pooling, whose query is a vector [32]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.one, self.two = nn.Parameter(torch.randn(32)), nn.Linear(32, width), nn.Linear(width, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weights = (input @ self.query).sigmoid()
        return self.two(self.one((input * weights[..., None]).sum(1)).relu())


class Upsampling(nn.Module):
    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=groups)
        self.mix, self.out = nn.Conv2d(16, width, 3, padding=1), nn.Conv2d(width, 2, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.up(self.down(input).relu()).relu()).relu())


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru, self.one, self.two = nn.GRU(32, 32, batch_first=True), nn.Linear(32, width), nn.Linear(width, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(self.gru(input)[0].mean(1)).relu())


class Branching(nn.Module):
    """The weights of its branches stand inside an If."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two, self.wide = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, width)
        self.out = nn.Linear(width, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = torch.cond(input.mean() > 0, lambda x: self.one(x), lambda x: self.two(x).relu(), (input,))
        return self.out(self.wide(x).relu())


Build = Callable[[int], nn.Module]
FEW: dict[str, tuple[Build, TensorSpec, object, str]] = {
    # What a method cannot take is a small part of the model, and named.
    "experts, dynamic": (Experts, ROW, Dynamic(), "MatMul"),
    "experts, static": (Experts, ROW, Static(), "MatMul"),
    "experts, weight only": (Experts, ROW, WeightOnly(), "MatMul"),
    "einsum": (lambda width: Experts(width, einsum=True), ROW, Dynamic(), "Einsum"),
    "recurrent": (Gated, STEPS, Dynamic(), "gru/GRU"),
    "branches": (Branching, ROW, Dynamic(), ""),
    "in groups": (lambda width: Upsampling(4, width // 8), IMAGE, Static(), "up/ConvTranspose"),
    "each channel alone": (lambda width: Upsampling(16, width // 8), IMAGE, Static(), ""),
}
MOST = {name: FEW[name] for name in ("experts, dynamic", "experts, static", "einsum", "recurrent", "branches")}


def quantized(config: object, made: Workload, folder: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    scratch = folder / str(len(list(folder.iterdir())))
    scratch.mkdir()
    source = export(made.build(), made.inputs, made.outputs, folder / "model.onnx")
    context = Context(made, made.build(), Target(cores=1), 0, scratch, lambda text, _: said.append(text))
    path = step.apply(config, source, context)
    return path, [*said, told(METHODS[type(config)], config, source, path, last=True)]


@pytest.mark.parametrize("name", FEW)
def test_a_small_part_stays_float_and_is_named(name: str, tmp_path: Path) -> None:
    build, spec, config, left = FEW[name]
    torch.manual_seed(0)
    made = workload(build(512).eval(), spec)
    path, said = quantized(config, made, tmp_path)
    assert distance(path, made) < 0.1
    assert any("float stays" in line and left in line for line in said)
    assert sum(floats(path).values()) < 0.5 * sum(floats(tmp_path / "model.onnx").values())


@pytest.mark.parametrize("name", MOST)
def test_a_model_of_which_most_stays_float_is_no_success(name: str, tmp_path: Path) -> None:
    build, spec, config, left = MOST[name]
    torch.manual_seed(0)
    made = workload(build(8).eval(), spec)
    with pytest.raises(NoEffect, match=r"cannot quantize most of this model; float stays [5-9]\d% of") as refused:
        quantized(config, made, tmp_path)
    assert left in refused.value.what
    assert "quantize.half" in refused.value.fix and "--partial" in refused.value.fix
    # Both ways out work.
    path, said = quantized(replace(config, partial=True), made, tmp_path)  # type: ignore[type-var]
    assert distance(path, made) < 0.1
    assert any("float stays" in line for line in said)
    if name != "branches":
        path, said = quantized(Half(), made, tmp_path)
        assert distance(path, made) < 0.01


def test_what_another_step_takes_later_is_not_held_against_the_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Experts(8).eval(), ROW)
    first, _ = quantized(Dynamic(partial=True), made, tmp_path)
    assert "float stays" in told(METHODS[Dynamic], Dynamic(), tmp_path / "model.onnx", first, last=False)
    scratch = tmp_path / "second"
    scratch.mkdir()
    context = Context(made, made.build(), Target(cores=1), 0, scratch, lambda text, _: None)
    second = step.apply(Half(), first, context)
    assert told(METHODS[Half], Half(), first, second, last=True) == ""
    assert distance(second, made) < 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("each_step_faster")
def test_the_command_refuses_and_goes_on_as_its_fix_says(
    optimize: Optimize, user_file: Callable[..., str], tmp_path: Path
) -> None:
    """Convolutions are most of the model, and the default method takes dense layers."""
    convolutions = "nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 16, 1))"
    source = user_file(("768", "2"), ("nn.Conv2d(1, 16, 3)", convolutions))
    ended = optimize("quantize", source, "--output", tmp_path / "made", "--batch", "1")
    assert ended.code == 4
    assert "quantize.dynamic cannot quantize most of this model; float stays" in ended.err
    assert "conv.1/Conv" in ended.err and "--partial" in ended.err
    ended = optimize("quantize", source, "--output", tmp_path / "made", "--batch", "1", "--partial")
    assert ended.code == 0, ended.err
    assert "quantize.dynamic: float stays" in ended.err


def test_a_vector_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Pooled(64).eval(), STEPS)
    for config in (Dynamic(), Static()):
        path, _ = quantized(config, made, tmp_path)
        assert distance(path, made) < 0.1


def test_one_layer_that_cannot_be_taken_does_not_end_a_search(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = replace(
        workload(Upsampling(4, 64).eval(), IMAGE),
        scores=lambda outputs, targets, reference: {"near": abs(outputs["y"] - reference["y"]).mean((1, 2, 3)) < 0.1},
        bounded=True,
        selection=workload(Upsampling(4, 64).eval(), IMAGE).evaluation,
    )
    path, said = quantized(Mixed(), made, tmp_path)
    assert distance(path, made) < 0.1
    assert any("float stays" in line and "up/ConvTranspose" in line for line in said)


def test_what_was_asked_to_stay_float_is_not_held_against_a_method(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(Pooled(512).eval(), STEPS)
    path, said = quantized(Dynamic(exclude=("one/*",)), made, tmp_path)
    assert any("float stays" in line and "one/" in line for line in said)
    assert sum(floats(path).values()) > 0.5 * sum(floats(tmp_path / "model.onnx").values())
