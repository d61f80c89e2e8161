"""How a user's module is run: at what sizes, what it keeps of a call, what its answers depend on, its masks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Dim, TensorSpec
from optimize.judge import macs, mates
from optimize.methods.export.onnx import export
from optimize.model.errors import BadGraph, BadModel, BadWorkload
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs import endpoint
from optimize.runs import inspect as layers
from optimize.source.load import load_workload
from optimize.step.bundle import Bundle
from serve.config.target import Target
from tests.optimize.brought import ROW, WIDTH, Net, agree, brought, through_a_bundle
from tests.optimize.conftest import Optimize

LENGTH = Dim("length", 4, 6, 24)
TOKENS = TensorSpec("tokens", "int64", (BATCH, LENGTH), (0, 9))
KEEP = TensorSpec("keep", "int64", (BATCH, LENGTH), (1, 1))


class Chosen(Net):
    """Takes one of two branches by the data, with torch.cond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cond(x.mean() > 0, lambda h: h.relu(), lambda h: h.sigmoid(), (self.one(x),))
        y: torch.Tensor = self.two(h)
        return y


class Twice(nn.Module):
    """Two such choices, one in the other's module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = Chosen(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y - 1, (self.out(y),))  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Chosen, Twice])
def test_a_choice_by_torch_cond_is_counted_and_asked_as_often_as_one_likes(
    model: type[nn.Module], tmp_path: Path
) -> None:
    made, answers = through_a_bundle(brought(model), tmp_path)
    agree(answers)
    assert macs.total(made.module, [ROW])
    assert made.graph is not None
    with OnnxPredictor(made.graph) as onnx:
        for sign in (1, -1, 1):
            arrays = {"x": np.full((3, WIDTH), 0.3 * sign, np.float32)}
            wanted = TorchPredictor(made.module, ["y"]).predict(arrays)["y"]
            np.testing.assert_allclose(onnx.predict(arrays)["y"], wanted, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_counted_is_not_counted_and_said() -> None:
    class Uncountable(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise RuntimeError("not under a counter")
            return super().forward(x)

    assert macs.total(Uncountable(), [ROW]) is None
    found = layers.inspect(Bundle(brought(Uncountable), Uncountable()))
    assert found.macs is None
    assert macs.UNKNOWN in found.warnings


class Adapting(Net):
    """Normalizes by the batch at hand, and needs three samples for that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting() or len(x) >= 3:
            return super().forward((x - x.mean(0)) / x.std(0))
        raise ValueError(f"{len(x)} samples have no spread")


FROM_3 = TensorSpec("x", "float32", (Dim("batch", 3, 8, 64), WIDTH), (-1, 1))


def test_no_smaller_batch_than_declared_is_ever_run(tmp_path: Path) -> None:
    load = brought(Adapting, [FROM_3])
    made, answers = through_a_bundle(load, tmp_path)
    agree(answers)
    assert made.graph is not None
    assert macs.total(made.module, load.inputs) == macs.total(Net(), [ROW])
    assert layers.inspect(made).parameters
    few = mates.deviation(made.graph, [load.first()], 8, few=3)
    assert few["y"] > 0
    with pytest.raises(BadWorkload, match="declared from a batch of 3") as raised:
        endpoint.check(tmp_path / "repository", load, Target())
    assert "from 1" in raised.value.fix


def test_a_batch_declared_from_1_as_the_way_out_says_may_be_served(tmp_path: Path, server_prefix: Path) -> None:
    endpoint.check(tmp_path / "repository", brought(Net, [ROW]), Target())


class Dropping(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(functional.dropout(self.one(x).relu(), 0.3, self.training if self.mended else True))
        return y

    mended = False


class Sampling(Dropping):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        y: torch.Tensor = self.two(h if self.mended else h + torch.randn_like(h))
        return y


class Monte(Dropping):
    """Keeps its dropout on in evaluation, to answer with a spread."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.drop.train(not self.mended)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(self.drop(self.one(x)))
        return y


class Remembering(Dropping):
    """Smooths what it saw before into its answer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.mended:
            self.mean += x.mean(0)  # type: ignore[operator]
        return super(Dropping, self).forward(x + self.mean)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (Dropping, "answers by chance: asked twice, output 'y' differs by"),
        (Sampling, "answers by chance"),
        (Monte, "answers by chance"),
        (Remembering, "changes its answers from call to call"),
    ],
)
def test_a_module_is_asked_twice_before_anything_else_is_blamed(
    model: type[Dropping], what: str, tmp_path: Path
) -> None:
    class Mended(model):  # type: ignore[misc, valid-type]
        mended = True

    with pytest.raises(BadModel, match=what) as raised:
        export(model().eval(), [ROW], ["y"], tmp_path / "model.onnx")
    assert "\n" not in raised.value.what
    assert raised.value.fix
    export(Mended().eval(), [ROW], ["y"], tmp_path / "model.onnx")


class Counting(Net):
    """Counts its calls, which its answers do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # type: ignore[operator]
        return super().forward(x)


class Growing(nn.Module):
    """Keeps a table of places that grows with the longest text so far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out, self.table = nn.Embedding(10, 8), nn.Linear(8, 3), torch.zeros(0, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(self.table) < tokens.shape[1]:
            self.table = torch.arange(tokens.shape[1])[:, None] / torch.arange(1, 9)
        y: torch.Tensor = self.out(self.words(tokens) * self.table[: tokens.shape[1]]).mean(1)
        return y


class First(Growing):
    """Makes its table at the first call, of full size."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if not len(self.table):
            self.table = torch.arange(24)[:, None] / torch.arange(1, 9)
        return super().forward(tokens)


@pytest.mark.parametrize(("model", "inputs"), [(Counting, ROW), (Growing, TOKENS), (First, TOKENS)])
def test_what_a_module_keeps_of_its_calls_serves_export_and_training(
    model: type[nn.Module], inputs: TensorSpec, tmp_path: Path
) -> None:
    made, answers = through_a_bundle(brought(model, [inputs]), tmp_path)
    agree(answers)
    made.module.train()
    arrays = {name: torch.from_numpy(array) for name, array in made.workload.first().items()}
    made.module(**arrays).sum().backward()
    assert all(parameter.grad is not None for parameter in made.module.parameters())


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 1)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(10, 8), encoder()

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.encoder(self.words(tokens), src_key_padding_mask=keep == 0)
        return y


class Causal(Padded):
    """Builds its mask in forward, where torch looks whether it is causal."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        y: torch.Tensor = self.encoder(self.words(tokens), mask=mask)
        return y


class Hinted(Padded):
    """The same with the hint that it is causal, and padding."""

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        y: torch.Tensor = self.encoder(self.words(tokens), mask, src_key_padding_mask=keep == 0, is_causal=True)
        return y


class Decoding(Padded):
    """torch's decoder, which looks at its mask too."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = self.words(tokens)
        y: torch.Tensor = self.decoder(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]))
        return y


class Hybrid(Padded):
    """Beside a recurrent layer, which only torch's tracer follows at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y: torch.Tensor = self.encoder(self.gru(self.words(tokens))[0])
        return y


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Hybrid, (TOKENS,)),
        (Padded, (TOKENS, KEEP)),
        (Causal, (TOKENS,)),
        (Hinted, (TOKENS, KEEP)),
        (Decoding, (TOKENS,)),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_s_own_encoders_are_exported_with_their_masks(
    model: Callable[[], nn.Module], inputs: Sequence[TensorSpec], tmp_path: Path
) -> None:
    module = model().eval()
    path = export(module, inputs, ["y"], tmp_path / "model.onnx")
    arrays = {spec.name: spec.generate(np.random.default_rng(0), 5, "maximum") for spec in inputs}
    if "keep" in arrays:
        arrays["keep"][1:, 7:] = 0
    with OnnxPredictor(path) as onnx, torch.inference_mode():
        # As the user's own process answers it, fast paths and all, where there is no padding.
        wanted = module(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
        np.testing.assert_allclose(onnx.predict(arrays)["y"][0], wanted[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(onnx.predict(arrays)["y"][:, :7], wanted[:, :7], rtol=1e-3, atol=1e-4)


def test_a_row_that_is_masked_whole_is_named_and_a_range_mends_it(tmp_path: Path) -> None:
    loose = TensorSpec("keep", "int64", (BATCH, LENGTH), (0, 1))
    with pytest.raises(BadGraph, match=r"differs from the module .*: output 'y' is NaN or infinite where") as raised:
        export(Padded().eval(), [TOKENS, loose], ["y"], tmp_path / "model.onnx")
    assert "declare the range" in raised.value.fix
    assert "unmasked" in raised.value.fix

    class Unmasked(Padded):
        def forward(self, tokens: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            first = torch.arange(keep.shape[1]) == 0
            return super().forward(tokens, keep + first)

    export(Unmasked().eval(), [TOKENS, loose], ["y"], tmp_path / "model.onnx")


class Solving(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = x[:, :4].unflatten(1, (2, 2)) + 3 * torch.eye(2)
        return self.solve(matrix, super().forward(x)[:, :2, None]).squeeze(-1)

    def solve(self, matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve(matrix, right)
        return solved


class Written(Solving):
    """The same by Cramer's rule."""

    def solve(self, matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        (a, b), (c, d), (e, f) = matrix[:, 0].unbind(1), matrix[:, 1].unbind(1), (right[:, 0], right[:, 1])
        a, b, c, d = (part[:, None] for part in (a, b, c, d))
        return torch.stack([d * e - b * f, a * f - c * e], 1) / (a * d - b * c)[..., None]


class Zeta(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.zeta(super().forward(x).abs() + 2, torch.ones(1))  # type: ignore[no-any-return]


class Mixed(Net):
    """Computes in 16 bits where torch thinks that enough."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


class Sloping(Net):
    """Answers with a gradient, as models of energies do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).square().sum(), x)[0]


class Derived(Net):
    """The same by the chain rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.one(x)
        slope: torch.Tensor = 2 * self.two(h.relu()) @ self.two.weight * (h > 0) @ self.one.weight
        return slope


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths[:, 0].cpu(), batch_first=True, enforce_sorted=False)
        return self.lstm(packed)[1][0][0]  # type: ignore[no-any-return]


class Unpacked(Packed):
    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lstm(x)[0]
        return y.gather(1, (lengths - 1).view(-1, 1, 1).expand(-1, 1, y.shape[2]))[:, 0]


STEPS = (
    TensorSpec("x", "float32", (BATCH, LENGTH, 3), (-1, 1)),
    TensorSpec("lengths", "int64", (BATCH, 1), (1, 4)),
)


@pytest.mark.parametrize(
    ("model", "inputs", "what", "fix", "mended"),
    [
        (Solving, (ROW,), "ONNX has no operator for aten._linalg_solve_ex", "in operators that ONNX has", Written),
        (Zeta, (ROW,), "ONNX has no operator for prims.zeta", "in operators that ONNX has", Net),
        (Mixed, (ROW,), "Could not find an implementation for Gemm", "let forward compute in float32", Net),
        (Sloping, (ROW,), "cannot be exported", "no torch.autograd.grad", Derived),
        (Packed, STEPS, "torch.export does not follow pack_padded_sequence", "without pack_padded_sequence", Unpacked),
    ],
)
def test_what_dynamo_found_is_told_in_one_line_with_its_own_way_out(
    model: type[nn.Module],
    inputs: Sequence[TensorSpec],
    what: str,
    fix: str,
    mended: type[nn.Module],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(BadGraph, match=what) as raised:
        export(model().eval(), inputs, ["y"], tmp_path / "model.onnx")
    assert "\n" not in raised.value.what
    assert "frozen" not in raised.value.what
    assert fix in raised.value.fix
    assert capfd.readouterr() == ("", ""), "torch prints whole graphs when it gives up"
    path = export(mended().eval(), inputs, ["y"], tmp_path / "model.onnx")
    if mended is not Net:
        arrays = {spec.name: spec.generate(np.random.default_rng(0), 5) for spec in inputs}
        with OnnxPredictor(path) as onnx:
            wanted = TorchPredictor(model(), ["y"]).predict(arrays)["y"]
            np.testing.assert_allclose(onnx.predict(arrays)["y"], wanted, rtol=1e-3, atol=1e-4)


def test_the_json_of_an_export_that_fails_is_one_document(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from tests.optimize.brought import brought\nfrom tests.optimize.source.test_asking import Solving\n"
        "def workload():\n    return brought(Solving)\n"
    )
    source = load_workload(f"{tmp_path / 'user.py'}:workload").source
    ended = optimize("export", source, "--output", tmp_path / "made", "--json")
    assert ended.code == 4
    assert (
        json.loads(ended.out)["error"]["what"] == "cannot be exported: ONNX has no operator for aten._linalg_solve_ex"
    )
    assert not (tmp_path / "made").exists()
