"""Whatever module hypothesis builds: right answers, or one line with a way out; never a bug of ours.

The variable MODULES says how many are built; `make modules` builds 300.
"""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from modelathe.errors import BadInput, Refused
from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.source.workload import Workload
from tests.optimize.brought import agree, brought, through_a_bundle

MODULES = int(os.environ.get("MODULES", "6"))
WIDTH = 4
LENGTH = Dim("length", 2, 5, 9)
End = Callable[[torch.Tensor], torch.Tensor]


class Stack(nn.Module):
    """Layers in a row over [batch, length, width], each of which keeps that shape."""

    def __init__(
        self, layers: list[nn.Module], scale: torch.Tensor, end: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.layers, self.end = nn.ModuleList(layers), end
        if isinstance(scale, nn.Parameter):
            self.scale: torch.Tensor = scale
        else:
            self.register_buffer("scale", scale, persistent=len(layers) % 2 == 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale.to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)


class First(nn.Module):
    """A recurrent layer without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)[0]


class Turned(First):
    """A layer over channels."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Attending(First):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x, x, x)[0]


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv": lambda: Turned(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: Turned(nn.BatchNorm1d(WIDTH)),
    "lstm": lambda: First(nn.LSTM(WIDTH, WIDTH, batch_first=True)),
    "gru": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "attention": lambda: Attending(nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, dropout=0.0),
    "gelu": nn.GELU,
    "dropout": lambda: nn.Dropout(0.5),
}
AROUND: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda layer: None,
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
    "hook": lambda layer: layer.register_forward_hook(lambda layer, args, made: made * 2),
    "frozen": lambda layer: layer.requires_grad_(False),
}
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda tensor: tensor[0].clone(),
    "slice": lambda tensor: tensor[1],
    "expanded": lambda tensor: tensor[0, :1].expand(WIDTH),
    "strided": lambda tensor: tensor.t()[:WIDTH, 0],
    "parameter": lambda tensor: nn.Parameter(tensor[2], tensor.is_floating_point()),
    "reversed": lambda tensor: tensor[0].flip(0),
}
KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
ENDS: dict[str, End] = {
    "all": lambda x: x,
    "mean": lambda x: x.mean(1),
    "last": lambda x: x[:, -1],
    "label": lambda x: x.mean(1).argmax(-1),
    "one number": lambda x: x.mean((1, 2)),
    "wide": lambda x: x.double(),
    "short": lambda x: x.bfloat16(),
    "complex": lambda x: torch.fft.fft(x),
    "by chance": lambda x: x + torch.rand_like(x),
    "branching": lambda x: x * 2 if x.sum() > 0 else x,
    "sorted": lambda x: x.sort(1).values,
    "without an operator": lambda x: torch.special.erfcx(x),
}


@st.composite
def modules(draw: st.DrawFn) -> Callable[[], nn.Module]:
    """Draw a function that builds the same module at every call."""
    names = draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3))
    around = draw(st.sampled_from(list(AROUND)))
    view, kind = draw(st.sampled_from(list(VIEWS))), draw(st.sampled_from(KINDS))
    end, dtype = draw(st.sampled_from(list(ENDS))), draw(st.sampled_from((torch.float32,) * 4 + KINDS[1:3]))
    shared = draw(st.booleans())

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [LAYERS[name]() for name in names]
        weighted = [layer for layer in layers[0].modules() if type(layer) in (nn.Linear, nn.Conv1d)]
        for layer in weighted[:1]:
            AROUND[around](layer)
        scale = VIEWS[view](torch.arange(1, 4 * WIDTH + 1).reshape(4, WIDTH).remainder(3).to(kind))
        return Stack(layers * (2 if shared else 1), scale, ENDS[end]).to(dtype)

    build.__qualname__ = f"{names} {around} {view} {kind} {end} {dtype} shared {shared}"
    return build


def workload(build: Callable[[], nn.Module]) -> Workload:
    return brought(build, [TensorSpec("x", "float32", (BATCH, LENGTH, WIDTH), (-1, 1))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=MODULES,
    deadline=None,
    derandomize=MODULES < 100,
    phases=[Phase.generate],  # each one takes seconds, too long to look for a smaller one
    suppress_health_check=list(HealthCheck),
)
@given(build=modules())
def test_any_module_is_right_or_refused_in_one_line(build: Callable[[], nn.Module]) -> None:
    with TemporaryDirectory() as folder:
        try:
            answers = through_a_bundle(workload(build), Path(folder))[1]
        except (BadInput, Refused) as refusal:
            assert refusal.what
            assert "\n" not in refusal.what
            assert refusal.fix
        else:
            agree(answers)
