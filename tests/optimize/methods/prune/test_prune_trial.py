"""Channels that the model's code divides: without those that do nothing, a model answers what it answered with them."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.methods import apply as step
from optimize.methods.prune.channels import Channels
from optimize.methods.prune.groups.trial import exact, sound
from optimize.model.errors import BadModel, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target

IMAGE = TensorSpec("x", "float32", (BATCH, 3, 8, 8), (-1, 1))
SEQUENCE = TensorSpec("x", "float32", (BATCH, 6, 12), (-1, 1))
WIDE = 16
DEAD = [1, 2, 3, 9]
"""Three channels of the first half, one of the second: a quarter of all."""


class Divided(nn.Module):
    """A wide convolution, what `way` makes of its channels, and a narrow one that reads that."""

    def __init__(self, way: str) -> None:
        super().__init__()
        read = {"split": 24, "maxout": WIDE // 4, "pixels": WIDE // 4}.get(way, WIDE)
        self.wide, self.inner = nn.Conv2d(3, WIDE, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.narrow, self.out, self.way = nn.Conv2d(read, 12, 1), nn.Linear(12, 5), way
        with torch.no_grad():
            self.wide.weight[DEAD], self.wide.bias[DEAD] = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        n, c, h, w = x.shape
        one, other = x.chunk(2, 1) if self.way in ("split", "half", "label") else (x, x)
        if self.way == "split":
            x = torch.cat([one, other, self.inner(other).relu()], 1)
        elif self.way in ("half", "label"):
            x = torch.cat([one.relu(), other], 1)
        elif self.way == "shuffle":
            x = x.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.way == "maxout":
            x = x.view(n, 4, -1, h, w).amax(1)
        elif self.way == "pixels":
            x = nn.functional.pixel_shuffle(x, 2)
        x = self.out(self.narrow(x).relu().mean((2, 3)))
        return x.argmax(1) if self.way == "label" else x


class Heads(nn.Module):
    """Attention that takes the width of its heads with -1, and may turn the halves of each against each other."""

    def __init__(self, count: int, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.q, self.k, self.v, self.out = *(nn.Linear(12, WIDE) for _ in range(3)), nn.Linear(WIDE, 5)
        self.count = count
        with torch.no_grad():
            for layer in (self.q, self.k, self.v):
                layer.weight[DEAD], layer.bias[DEAD] = 0, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = (one(x).view(n, length, self.count, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        if self.turned:
            q, k = (torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) for x in (q, k))
        mixed = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], TensorSpec, bool]] = {
    # The code, its input, and whether the dead channels may go.
    "plain": (lambda: Divided("plain"), IMAGE, True),
    "split": (lambda: Divided("split"), IMAGE, False),
    "half": (lambda: Divided("half"), IMAGE, False),
    "label": (lambda: Divided("label"), IMAGE, False),
    "shuffle": (lambda: Divided("shuffle"), IMAGE, False),
    "maxout": (lambda: Divided("maxout"), IMAGE, False),
    "pixels": (lambda: Divided("pixels"), IMAGE, False),
    "one head": (lambda: Heads(1), SEQUENCE, True),
    "two heads": (lambda: Heads(2), SEQUENCE, False),
    "turned heads": (lambda: Heads(2, turned=True), SEQUENCE, False),
    "four heads": (lambda: Heads(4), SEQUENCE, False),
}


def prune(model: nn.Module, spec: TensorSpec, scratch: Path, said: list[str], **options: Any) -> nn.Module:
    def batches() -> Iterator[Batch]:
        yield Batch({"x": spec.generate(np.random.default_rng(1), 8)})

    load = Workload("divided", model, (spec,), ("y",), batches, lambda o, t, r: {})
    context = Context(load, model, Target(cores=1), 0, scratch, lambda text, _: said.append(text))
    pruned: nn.Module = step.apply(Channels(ratio=0.25, **options), model, context)
    return pruned


@pytest.mark.parametrize("name", MODELS)
def test_no_cut_of_dead_channels_changes_an_answer(name: str, tmp_path: Path) -> None:
    build, spec, free = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    inputs = {"x": spec.generate(np.random.default_rng(2), 16)}
    wanted = TorchPredictor(model, ("y",)).predict(inputs)["y"]
    others = ("inner", "narrow") if spec is IMAGE else ()
    try:
        pruned = prune(model, spec, tmp_path, [], exclude=others)
    except NoEffect as nothing:
        assert not free
        assert "no layer that it may prune" in nothing.what or "changed nothing" in nothing.what
        return
    assert np.ptp(wanted) > 0
    np.testing.assert_allclose(TorchPredictor(pruned, ("y",)).predict(inputs)["y"], wanted, rtol=1e-3, atol=1e-5)
    assert free == (measure(pruned) < measure(model))


def measure(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["split", "two heads", "turned heads", "maxout"])
def test_a_group_that_cannot_be_cut_does_not_end_the_step(name: str, tmp_path: Path) -> None:
    build, spec, _ = MODELS[name]
    said: list[str] = []

    class Longer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = build(), nn.Linear(5, 32), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(self.first(x)).relu())

    torch.manual_seed(0)
    pruned = prune(Longer().eval(), spec, tmp_path, said)
    assert isinstance(pruned.one, nn.Linear)
    assert pruned.one.out_features == 24
    divided = "first.v" if "heads" in name else "first.wide"
    assert any("left alone" in line and divided in line for line in said)
    assert pruned.get_submodule(divided).weight.shape[0] == WIDE


class Rotary(nn.Module):
    """Blocks with a residual each, whose attentions turn the halves of every head against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.ModuleList(nn.Linear(32, 32) for _ in range(4)) for _ in range(1))
        self.into, self.norm, self.out = nn.Linear(12, 32), nn.LayerNorm(32), nn.Linear(32, 5)
        self.wide, self.narrow = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        for q, k, v, back in self.attentions:
            left, right, value = (each(self.norm(x)).view(*x.shape[:2], -1, 8).transpose(1, 2) for each in (q, k, v))
            left, right = (_turned(each) for each in (left, right))
            mixed = (left @ right.transpose(-2, -1)).softmax(-1) @ value
            x = x + back(mixed.transpose(1, 2).reshape(x.shape))
        return self.out((x + self.narrow(self.wide(self.norm(x)).relu())).mean(1))


def _turned(x: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, -1)
    return x * 0.8 + torch.cat([-other, one], -1) * 0.6


def test_channels_that_change_places_do_not_hold_the_step_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    said: list[str] = []
    begun = time.monotonic()
    pruned = prune(Rotary().eval(), SEQUENCE, tmp_path, said)
    assert pruned.get_submodule("wide").out_features == 36
    assert any("left alone" in line and "attentions.0.0" in line for line in said)
    # Without an end, the dependencies of one layer alone took longer than that.
    assert time.monotonic() - begun < 120


class Stepped(nn.Module):
    """A recurrent layer, called by its user step by step or once for all steps."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.into, self.layer, self.out = nn.Linear(12, 8), kind(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x).transpose(0, 1)
        if isinstance(self.layer, nn.RNNBase):
            return self.out(self.layer(x)[0][-1])
        state = None
        for row in x:
            state = self.layer(row, state)
        return self.out(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize(
    ("cell", "layer"), [(nn.LSTMCell, nn.LSTM), (nn.GRUCell, nn.GRU), (nn.RNNCell, nn.RNN)], ids=["lstm", "gru", "rnn"]
)
def test_a_cell_is_refused_and_the_layer_that_the_fix_names_is_cut(
    cell: type[nn.Module], layer: type[nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(BadModel, match="layer runs step by step") as refused:
        prune(Stepped(cell).eval(), SEQUENCE, tmp_path, [])
    assert f"nn.{layer.__name__}" in refused.value.fix
    assert prune(Stepped(layer).eval(), SEQUENCE, tmp_path, []).get_submodule("layer").hidden_size == 12


class Grouped(nn.Module):
    """Attention whose queries share keys, before one of torch's own: neither can be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.attention = nn.Linear(12, 16), nn.Linear(12, 16), nn.MultiheadAttention(16, 2)
        self.one, self.out = nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, 4, 4).transpose(1, 2)
        k, v = self.kv(x).view(n, length, 2, 2, 4).permute(2, 0, 3, 1, 4)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x.transpose(1, 2).reshape(n, length, WIDE).transpose(0, 1)
        return self.out(self.one(self.attention(x, x, x)[0].mean(0)).relu())


def test_what_the_graph_loses_track_of_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    said: list[str] = []
    pruned = prune(Grouped().eval(), SEQUENCE, tmp_path, said)
    assert pruned.get_submodule("one").out_features == 24
    assert any("left alone" in line and "q, kv" in line for line in said)


def test_the_chosen_units_are_tried_themselves() -> None:
    torch.manual_seed(0)
    model, spec = Heads(2).eval(), {"x": torch.randn(4, 6, 12)}
    # As many of both heads, at the same places, or not.
    assert exact(model, {"v": [0, 8]}, spec, ("y",))
    assert not exact(model, {"v": [0, 1]}, spec, ("y",))
    said: list[str] = []
    assert sound(model, {"v": [1, 2], "q": [0, 8]}, spec, ("y",), said.append) == {"q": [0, 8]}
    assert said == ["left alone, for without these channels the model answers otherwise: v"]
