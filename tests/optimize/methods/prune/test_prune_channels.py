"""Channel pruning: what goes and what stays on every kind of model, and that the outputs do not miss what goes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, TensorSpec
from optimize.judge import macs, measure
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.prune import cost, importance
from optimize.methods.prune.channels import Channels, needs
from optimize.methods.prune.groups import dependency, recurrent
from optimize.methods.prune.groups.group import Group, Member
from optimize.methods.prune.ranking import Ranked, choose
from optimize.model.errors import BadModel, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from serve.config.target import Target

IMAGE = TensorSpec("x", "float32", (BATCH, 3, 16, 16), (-2, 2))
ROW = TensorSpec("x", "float32", (BATCH, 12))
SEQUENCE = TensorSpec("x", "float32", (BATCH, 7, 12))
TOKENS = TensorSpec("x", "int64", (BATCH, 9), (0, 49))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            nn.init.normal_(layer.running_mean, std=0.2)
    return model.eval()


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.second, self.dense = nn.Conv2d(16, 12, 3), nn.Linear(12 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(self.norm(self.first(x)).relu_(), 2)
        return self.dense(functional.pad(self.second(x), (0, 1, 0, 1)).relu().flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.one = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.shortcut, self.dense = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.one(x)).relu()
        return self.dense((self.shortcut(x) + self.two(x)).relu().mean((2, 3)))


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.GroupNorm(4, 24), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.join = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x).relu()
        x = self.up(self.deep(skip).relu())
        return self.out(self.join(torch.cat([skip, x], 1)).relu())


class TextConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.dense = nn.Embedding(50, 16), nn.Conv1d(16, 24, 3), nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.conv(self.embed(x).transpose(1, 2)).relu().amax(2))


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mu, self.logvar = nn.Conv2d(3, 8, 4, 4), nn.Linear(128, 6), nn.Linear(128, 6)
        self.expand, self.first, self.norm = nn.Linear(6, 128), nn.ConvTranspose2d(8, 12, 2, 2), nn.BatchNorm2d(12)
        self.last = nn.ConvTranspose2d(12, 3, 2, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.encode(x).relu().flatten(1)
        mu, logvar = self.mu(x), self.logvar(x)
        x = self.expand(mu + 0.0 * logvar.exp()).view(-1, 8, 4, 4)
        return self.last(self.norm(self.first(x)).relu()).sigmoid(), mu, logvar


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.ConvTranspose2d(12, 24, 4)
        self.body = nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.ConvTranspose2d(24, 12, 4, 2, 1), nn.ReLU())
        self.last = nn.ConvTranspose2d(12, 1, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.expand(x[:, :, None, None]))).tanh()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.embed, self.encoder = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2)
        self.dense = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.encoder(self.embed(x)).mean(1)).sigmoid()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one(x).reshape(*x.shape[:2], 4, -1).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 16, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attention, self.fc1, self.fc2 = Attention(), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dense = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attention(self.norms[0](x))
        x = x + self.fc2(functional.gelu(self.fc1(self.norms[1](x))))
        return self.dense(x.mean(1))


class Recurrent(nn.Module):
    """`reads`: what of the recurrent layer goes into the head."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 1, both: bool = False, reads: str = "last"):
        super().__init__()
        self.embed, self.reads = nn.Embedding(50, 8), reads
        self.layer = kind(8, 12, layers, batch_first=reads != "time first", bidirectional=both)  # type: ignore[call-arg]
        wide = 12 * (1 + both)
        self.next = nn.GRU(wide, 10, batch_first=True) if reads == "next" else nn.Identity()
        self.norm, self.conv = nn.BatchNorm1d(wide), nn.Conv1d(wide, 6, 3)
        self.score = nn.Linear(wide, 1)
        self.head = nn.Linear({"next": 10, "conv": 6, "every": wide * 9}.get(reads, wide), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.reads == "time first":
            return self.head(self.layer(x.transpose(0, 1))[0][-1])
        out, state = self.layer(x)
        hidden = state[0] if isinstance(state, tuple) else state
        if self.reads == "hidden":
            out = torch.cat([*hidden[-1 - self.layer.bidirectional :]], 1)
        elif self.reads == "next":
            out = self.next(out)[0].mean(1)
        elif self.reads == "conv":
            out = self.conv(self.norm(out.transpose(1, 2))).relu().amax(2)
        elif self.reads == "attention":
            out = (self.score(out).softmax(1) * out).sum(1)
        else:
            out = out.flatten(1) if self.reads == "every" else out[:, -1]
        return self.head(out)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], TensorSpec, tuple[str, ...]]] = {
    "mlp": (Mlp, ROW, ("y",)),
    "convolutions": (Convolutions, IMAGE, ("y",)),
    "residual": (Residual, IMAGE, ("y",)),
    "depthwise": (Depthwise, IMAGE, ("y",)),
    "u-net": (UNet, IMAGE, ("y",)),
    "text convolution": (TextConvolution, TOKENS, ("y",)),
    "vae": (Vae, IMAGE, ("y", "mu", "logvar")),
    "generator": (Generator, ROW, ("y",)),
    "encoder": (Encoder, TOKENS, ("y",)),
    "vit": (Vit, IMAGE, ("y",)),
    "lstm": (lambda: Recurrent(nn.LSTM, 2, True), TOKENS, ("y",)),
    "gru": (lambda: Recurrent(nn.GRU, 1, False, "next"), TOKENS, ("y",)),
}


def workload(model: nn.Module, *inputs: TensorSpec, outputs: tuple[str, ...] = ("y",), **more: Any) -> Workload:
    def batches(seed: int = 1) -> Iterator[Batch]:
        rng = np.random.default_rng(seed)
        for _ in range(2):
            yield Batch({spec.name: spec.generate(rng, 8) for spec in inputs}, np.arange(8) % 2)

    return Workload(
        "tiny",
        model,
        inputs,
        outputs,
        lambda: batches(2),
        lambda o, t, r: {},
        training=batches,
        calibration=batches,
        **more,
    )


def prune(
    model: nn.Module,
    spec: TensorSpec,
    scratch: Path,
    outputs: tuple[str, ...] = ("y",),
    loss: Any = None,
    **options: Any,
) -> Any:
    load = workload(model, spec, outputs=outputs, loss=loss)
    context = Context(load, model, Target(cores=1), 0, scratch, lambda text, fraction: None)
    return step.apply(Channels(**options), model, context)


def sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def groups(model: nn.Module, spec: TensorSpec) -> dict[str, Group]:
    inputs = {spec.name: torch.from_numpy(spec.generate(np.random.default_rng(2), 4))}
    model.requires_grad_(True)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.RNNBase)]
    found = [recurrent.group(model, name, inputs) for name in layers]
    return {group.name: group for group in (*found, *dependency.groups(model, inputs)) if group}


def deaden(model: nn.Module, spec: TensorSpec, names: Iterable[str]) -> None:
    """Set every second unit of some groups to zero."""
    for name, group in groups(model, spec).items():
        if name in names:
            group.zero(range(1, group.units, 2))


def answers(model: nn.Module, spec: TensorSpec, outputs: tuple[str, ...]) -> dict[str, Array]:
    return TorchPredictor(model, outputs).predict({"x": spec.generate(np.random.default_rng(3), 5)})


def assert_same(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    for name, array in wanted.items():
        assert np.ptp(array) > 0.01
        np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_goes_is_what_the_outputs_do_not_miss(name: str, tmp_path: Path) -> None:
    build, spec, outputs = NETWORKS[name]
    # A layer or group normalization sees that channels are gone, zero or not.
    options = {"exclude": {"vit": ("patch",), "depthwise": ("9",)}.get(name, ())}
    model = seeded(build)
    before = {name: group.units for name, group in groups(model, spec).items()}
    cut = prune(model, spec, tmp_path, outputs, **options)
    after = {name: group.units for name, group in groups(cut, spec).items()}
    lost = [name for name, units in after.items() if units < before[name]]
    assert all(after[name] == before[name] // 2 for name in lost)
    assert lost
    model = seeded(build)
    deaden(model, spec, lost)
    wanted = answers(model, spec, outputs)
    result = prune(model, spec, tmp_path, outputs, **options)
    assert {name: group.units for name, group in groups(result, spec).items()} == after
    assert_same(answers(result, spec, outputs), wanted)


WIDTHS = {
    "residual": {"stem.0": 4, "one.0": 4, "one.3": 4, "two.0": 8, "two.3": 8, "shortcut": 8},
    "u-net": {"down": 4, "deep": 8, "up": 4, "join": 4},
    "vae": {"encode": 4, "first": 6},
    "encoder": {"encoder.layers.0.linear1": 16, "encoder.layers.1.linear1": 16},
    "vit": {"patch": 8, "fc1": 16, "fc2": 8, "attention.out": 8},
    "lstm": {"embed": 4, "layer": 6},
}


def width(layer: nn.Module) -> int:
    names = ("hidden_size", "embedding_dim", "out_channels", "out_features")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDTHS)
def test_a_cut_network_is_exported_and_rebuilt_from_its_bundle(name: str, tmp_path: Path) -> None:
    build, spec, outputs = NETWORKS[name]
    result = prune(seeded(build), spec, tmp_path, outputs)
    for layer, wanted in WIDTHS[name].items():
        assert width(result.get_submodule(layer)) == wanted, layer
    wanted = answers(result, spec, outputs)
    load = workload(seeded(build), spec, outputs=outputs)
    saved = bundles.save(bundles.Bundle(replace(load, source="tiny.py:workload"), result), tmp_path / "bundle")
    assert saved.folder
    loaded = bundles.load(saved.folder, load).module
    assert sizes(loaded) == sizes(result)
    assert_same(answers(loaded, spec, outputs), wanted)
    with OnnxPredictor(export(loaded, (spec,), outputs, tmp_path / "model.onnx")) as predictor:
        assert_same(predictor.predict({"x": spec.generate(np.random.default_rng(3), 5)}), wanted)


@pytest.mark.parametrize(
    ("kind", "layers", "both", "reads"),
    [
        (nn.LSTM, 1, False, "last"),
        (nn.GRU, 1, False, "last"),
        (nn.RNN, 1, False, "last"),
        (nn.RNN, 3, True, "last"),
        (nn.LSTM, 2, True, "time first"),
        (nn.LSTM, 2, True, "hidden"),
        (nn.GRU, 1, True, "hidden"),
        (nn.LSTM, 1, True, "next"),
        (nn.LSTM, 2, False, "next"),
        (nn.GRU, 1, True, "conv"),
        (nn.RNN, 1, False, "every"),
        (nn.LSTM, 1, True, "attention"),
    ],
)
def test_hidden_units_go_with_all_that_reads_them(
    kind: type[nn.RNNBase], layers: int, both: bool, reads: str, tmp_path: Path
) -> None:
    model = seeded(lambda: Recurrent(kind, layers, both, reads))
    deaden(model, TOKENS, ("layer",))
    wanted = answers(model, TOKENS, ("y",))
    result = prune(model, TOKENS, tmp_path, exclude=("embed", "conv", *(["next"] if reads == "next" else [])))
    assert result.layer.hidden_size == 6
    assert result.layer.weight_hh_l0.shape == (result.layer.weight_ih_l0.shape[0], 6)
    assert_same(answers(result, TOKENS, ("y",)), wanted)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("reads", ["itself", "outside", "normalized", "sum of a half", "projected", "twice in a sum"])
def test_units_that_cannot_be_followed_are_left_alone(reads: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(12, 12, batch_first=True, proj_size=6 * (reads == "projected"))
            self.norm, self.head = nn.LayerNorm(12), nn.LazyLinear(8)
            self.head(torch.zeros(1, 6 if reads in ("sum of a half", "projected", "twice in a sum") else 12))
            self.out = nn.Linear(12 if reads == "outside" else 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x)[0]
            if reads == "itself":
                out = out + x
            if reads == "outside":
                return out[:, -1]
            out = self.norm(out) if reads == "normalized" else out
            if reads == "sum of a half":
                out = out[..., :6] + out[..., 6:]
            if reads == "twice in a sum":
                out = out[..., :6] * 2.0 + out.flip(-1)[..., :6]
            return self.out(self.head(out[:, -1]).relu())

    model = seeded(Model)
    if reads == "outside":
        with pytest.raises(NoEffect, match="no layer that it may prune"):
            prune(model, SEQUENCE, tmp_path)
        return
    result = prune(model, SEQUENCE, tmp_path)
    assert result.layer.hidden_size == 12
    assert result.head.out_features == 4


class Stateful(nn.Module):
    """A recurrent layer that is given its first state, or its own last one, or gives it to another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.other = nn.LSTM(12, 12, batch_first=True), nn.LSTM(12, 12, batch_first=True)
        self.head, self.out, self.way = nn.Linear(12, 8), nn.Linear(8, 3), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way in ("zeros", "twelve zeros"):
            size = self.layer.hidden_size if self.way == "zeros" else 12
            out = self.layer(x, (x.new_zeros(1, len(x), size),) * 2)[0]
        elif self.way == "loop":
            out, state = self.layer(x[:, :1])
            for step in range(1, x.shape[1]):
                out, state = self.layer(x[:, step : step + 1], state)
        elif self.way == "decoder":
            out = self.other(x, self.layer(x)[1])[0]
        else:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
            out = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]
        return self.out(self.head(out[:, -1]).relu())


@pytest.mark.parametrize(
    ("way", "kept"), [("zeros", 6), ("twelve zeros", 12), ("loop", 6), ("decoder", 12), ("packed", 12)]
)
def test_a_state_that_the_code_handles_is_respected(way: str, kept: int, tmp_path: Path) -> None:
    model = seeded(lambda: Stateful(way))
    deaden(model, SEQUENCE, ("layer", "head") if kept == 6 else ("head",))
    wanted = answers(model, SEQUENCE, ("y",))
    result = prune(model, SEQUENCE, tmp_path)
    assert (result.layer.hidden_size, result.head.out_features) == (kept, 4)
    assert_same(answers(result, SEQUENCE, ("y",)), wanted)


class Doubtful(nn.Module):
    """Runs without some channels of `wide`, but not as if those were zero."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.wide, self.narrow, self.out, self.way = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 4), way
        self.flat = nn.Linear(8 * 256, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(x)
        if self.way == "channels last":
            return self.out(self.flat(x.permute(0, 2, 3, 1).flatten(1)).relu())
        x = self.narrow(x.mean((2, 3)).softmax(1) if self.way == "softmax" else x.mean((2, 3)))
        if self.way == "branch" and bool(x.sum() > 0):
            x = x.relu()
        return self.out(Double.apply(x) if self.way == "function" else x)  # type: ignore[no-untyped-call]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


@pytest.mark.parametrize(
    ("way", "wide"), [("channels last", 8), ("softmax", 8), ("branch", 4), ("function", 4), ("plain", 4)]
)
def test_a_cut_that_would_not_be_exact_is_not_made(way: str, wide: int, tmp_path: Path) -> None:
    result = prune(seeded(lambda: Doubtful(way)), IMAGE, tmp_path)
    assert result.wide.out_channels == wide
    assert (result.flat if way == "channels last" else result.narrow).out_features == 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc2(self.fc1(self.embed(x).mean(1)).relu()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.shared, self.out = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.shared(self.shared(self.into(x)).relu()).relu())


def test_tied_weights_stay_tied_and_a_shared_layer_stays_one(tmp_path: Path) -> None:
    tied = prune(seeded(Tied), TOKENS, tmp_path)
    assert tied.head.weight is tied.embed.weight
    assert (tied.embed.embedding_dim, tied.fc1.out_features, tied.fc2.out_features) == (16, 16, 16)
    shared = prune(seeded(Shared), ROW, tmp_path)
    assert (shared.into.out_features, shared.shared.in_features, shared.shared.out_features) == (8, 8, 8)


def test_a_frozen_parameter_stays_frozen(tmp_path: Path) -> None:
    model = seeded(Convolutions)
    model.first.requires_grad_(False)
    result = prune(model, IMAGE, tmp_path)
    frozen = [name for name, parameter in result.named_parameters() if not parameter.requires_grad]
    assert frozen == ["first.weight", "first.bias"]
    assert result.first.out_channels == 8


def scored(score: str, change: Callable[[Mlp], None], tmp_path: Path, **options: Any) -> list[int]:
    """Which of the first layer's 16 units stay, told by a mark in the bias."""
    model = seeded(Mlp)
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(16) / 1000)
        change(model)
    result = prune(model, ROW, tmp_path, score=score, exclude=("2",), **options)
    return [round(mark * 1000) % 1000 for mark in result[0].bias.tolist()]


def test_l1_and_l2_rank_by_the_weights(tmp_path: Path) -> None:
    def change(model: Mlp) -> None:
        model[2].weight.zero_()
        # Units with one large weight have the larger l2, those with many small ones the larger l1.
        model[0].weight.zero_()
        model[0].weight[:8, 0] = 1.0
        model[0].weight[8:] = 0.2

    assert scored("l2", change, tmp_path) == list(range(8))
    assert scored("l1", change, tmp_path) == list(range(8, 16))


def test_taylor_ranks_by_what_the_loss_would_feel(tmp_path: Path) -> None:
    def change(model: Mlp) -> None:
        # Units with large weights that never fire change no output.
        model[0].weight[:8] *= 10
        model[0].bias[:8] -= 1000

    def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs["y"], targets)

    assert scored("l2", change, tmp_path) != list(range(8, 16))
    assert scored("taylor", change, tmp_path, loss=loss) == list(range(8, 16))


def test_activation_ranks_by_what_is_read(tmp_path: Path) -> None:
    def change(model: Mlp) -> None:
        model[0].weight.abs_()
        model[0].weight[8:] *= 10
        model[0].bias[8:] -= 1000

    assert scored("activation", change, tmp_path) == list(range(8))


def test_bn_scale_ranks_by_the_scale_and_says_where_there_is_none(tmp_path: Path) -> None:
    model = seeded(Convolutions)
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(16) % 2 + 0.1)
    result = prune(model, IMAGE, tmp_path, score="bn_scale")
    assert result.norm.weight.tolist() == pytest.approx([1.1] * 8)
    assert result.second.out_channels == 12
    with pytest.raises(NoEffect, match=r"bn_scale.*says nothing of the layers.*0, 2") as raised:
        prune(seeded(Mlp), ROW, tmp_path, score="bn_scale")
    assert "l2" in raised.value.fix


def test_lamp_weighs_a_channel_against_those_of_its_own_layer() -> None:
    group = Group("a", ("a",), 4, 1, (), lambda channels: None)
    layer = nn.Linear(1, 4)
    member = Member(layer, "out", torch.arange(4), torch.arange(4))
    values = torch.tensor([[3.0], [1.0], [2.0], [4.0]])
    with torch.no_grad():
        layer.weight.copy_(values.sqrt())
    scores = importance.rank(
        replace(group, members=(member,)),
        "lamp",
        importance.saliency("lamp", layer, None),  # type: ignore[arg-type]
    )
    assert scores is not None
    assert scores.tolist() == pytest.approx([3 / 7, 1 / 10, 2 / 9, 1.0])


def ranked(**scores: list[float]) -> dict[str, Ranked]:
    return {name: Ranked(torch.tensor(values), 1, len(values)) for name, values in scores.items()}


def test_a_layer_loses_its_share_or_the_lowest_go_wherever_they_are() -> None:
    groups = ranked(a=[0.9, 0.1, 0.8, 0.7], b=[0.2, 0.3, 0.5, 0.4])
    assert choose(groups, 0.5, "layer", 1) == {"a": [1, 3], "b": [0, 1]}
    assert choose(groups, 0.5, "global", 1) == {"a": [1], "b": [0, 1, 3]}
    assert choose(groups, 1.0, "global", 1) == {"a": [1, 2, 3], "b": [0, 1, 3]}
    assert choose(groups, 1.0, "layer", 1) == {"a": [1, 2, 3], "b": [0, 1, 3]}
    assert choose(groups, 0.1, "layer", 1) == {}


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 16), (0.3, 24), (0.9, 8), (0.01, 32)])
def test_a_multiple_is_kept(ratio: float, kept: int) -> None:
    gone = choose(ranked(a=list(range(32)), small=[1.0] * 7), ratio, "layer", 8)
    assert len(gone.get("a", [])) == 32 - kept
    assert "small" not in gone


def test_channels_in_parts_count_as_many() -> None:
    groups = {"a": Ranked(torch.arange(8.0), 4, 8), "b": Ranked(torch.arange(32.0) + 100, 1, 32)}
    assert choose(groups, 0.25, "global", 1) == {"a": [0, 1, 2, 3]}
    assert choose(groups, 0.5, "layer", 16)["a"] == [0, 1, 2, 3]


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_share_of_the_cost_goes(of: str, scope: str, tmp_path: Path) -> None:
    model = seeded(lambda: Wide(64))
    count = measure.parameters if of == "parameters" else lambda module: macs.total(module, (ROW,))
    result = prune(model, ROW, tmp_path, ratio=0.6, of=of, scope=scope)
    assert 0.6 <= 1 - count(result) / count(model) < 0.65


class Wide(nn.Sequential):
    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = [nn.Linear(12, width), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_a_cost_that_cannot_come_down_so_far_is_refused_with_what_was_reached(tmp_path: Path) -> None:
    # Layers 0 and 6 are left with one channel: 4,374 of 13,572 parameters stay.
    with pytest.raises(NoEffect, match=r"cannot remove 90% of the parameters: .*, 68% are gone"):
        prune(seeded(lambda: Wide(64)), ROW, tmp_path, ratio=0.9, of="parameters", exclude=("2", "4"))


@pytest.mark.slow
def test_a_share_of_the_latency_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.STEPS, "latency", 3)
    monkeypatch.setattr(cost, "SECONDS", 1.0)
    said: list[str] = []
    model = seeded(lambda: Wide(1024))
    context = Context(
        workload(model, ROW),
        model,
        Target(cores=1, batch=(1, 32)),
        0,
        tmp_path,
        lambda text, fraction: said.append(text),
    )
    result = step.apply(Channels(ratio=0.5, of="latency"), model, context)
    # Three matrix products of width² take nearly all the time: half of it goes with three tenths of the width.
    assert 128 < result[0].out_features < 1000
    assert any("of the latency are gone" in line for line in said)


def test_cuts_in_steps_with_training_between(tmp_path: Path) -> None:
    said: list[str] = []
    model = seeded(Mlp)
    context = Context(workload(model, ROW), model, Target(), 0, tmp_path, lambda text, fraction: said.append(text))
    healed = step.apply(Channels(cuts=2, heal_epochs=1), model, context)
    assert [line.split(",")[0] for line in said if "epoch" in line] == ["prune.channels: epoch 1"] * 2
    assert healed[0].out_features == 8
    plain = step.apply(Channels(cuts=2), model, context)
    assert sizes(plain) == sizes(healed)
    rows = {tuple(row) for row in model[0].weight.tolist()}
    assert {tuple(row) for row in plain[0].weight.tolist()} <= rows
    assert not {tuple(row) for row in healed[0].weight.tolist()} & rows


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, ()),
        ({"score": "taylor"}, ("training", "loss")),
        ({"score": "activation"}, ("calibration",)),
        ({"heal_epochs": 1}, ("training",)),
        ({"score": "activation", "heal_epochs": 1}, ("calibration", "training")),
    ],
)
def test_needs_depend_on_the_score_and_the_training(options: dict[str, Any], needed: tuple[str, ...]) -> None:
    assert needs(Channels(**options)) == needed


def test_excluded_layers_keep_their_channels_and_a_glob_without_a_match_is_refused(tmp_path: Path) -> None:
    result = prune(seeded(Residual), IMAGE, tmp_path, exclude=("one.*", "short*"))
    # The stem is added to what `one` returns, and `two` to the shortcut, so that these stay as well.
    assert result.stem[0].out_channels == 8
    assert result.one[0].out_channels == 8
    assert (result.two[0].out_channels, result.two[3].out_channels) == (8, 16)
    with pytest.raises(NoEffect, match=r"exclude: no layer matches 'conv\*'") as raised:
        prune(seeded(Residual), IMAGE, tmp_path, exclude=("one.*", "conv*"))
    assert "stem.0, one.0" in raised.value.fix


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1])
def test_a_ratio_that_leaves_nothing_or_everything_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        Channels(ratio=ratio)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Detached(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    class Numpy(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(super().forward(x).numpy())

    # What its layers return can be traced all the same.
    assert sizes(prune(seeded(Detached), ROW, tmp_path)) == sizes(prune(seeded(Mlp), ROW, tmp_path))
    with pytest.raises(BadModel, match=r"prune\.channels cannot follow its dependencies: Can't call numpy") as raised:
        prune(seeded(Numpy), ROW, tmp_path)
    assert "leave prune.channels out" in raised.value.fix
