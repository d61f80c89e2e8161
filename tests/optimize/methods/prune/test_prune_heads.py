import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, TensorSpec
from optimize.judge import macs
from optimize.methods import apply as step
from optimize.methods.export.onnx import export
from optimize.methods.prune.heads import Heads
from optimize.model.attention import Attention
from optimize.model.errors import BadBundle, BadRecipe, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.predict.onnxruntime import OnnxPredictor
from optimize.runs import recipe
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from serve.config.target import Target

WIDTH, LENGTH = 16, 5
SEQUENCE = TensorSpec("input", "float32", (BATCH, LENGTH, WIDTH))
"""As nn.Sequential names it."""


class Own(nn.Module):
    """Attention as users write it, with query, key and value in one layer, in one of three orders of its rows."""

    def __init__(self, order: str, inner: int = WIDTH) -> None:
        super().__init__()
        self.order, self.num_heads, self.head_dim = order, 4, inner // 4
        self.qkv, self.out = nn.Linear(WIDTH, 3 * inner), nn.Linear(inner, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        head_dim = width // self.num_heads if self.order == "fixed" else self.head_dim
        together = self.qkv(x)
        if self.order == "by head":
            q, k, v = together.view(batch, length, self.num_heads, 3 * head_dim).transpose(1, 2).chunk(3, -1)
        elif self.order == "last":
            q, k, v = together.view(batch, length, self.num_heads, head_dim, 3).transpose(1, 2).unbind(-1)
        else:
            q, k, v = together.view(batch, length, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        out: torch.Tensor = self.out(attended)
        return out


class Separate(nn.Module):
    """Everything in one module, the output layer first, a temperature for each head, an attribute of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.wo, self.wk, self.wv, self.wq = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.temperature = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv))
        attended = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
        out: torch.Tensor = self.wo(attended.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm = attention, nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        out: torch.Tensor = x + self.narrow(functional.gelu(self.wide(self.norm(x))))
        return out


def loss(outputs: Any, targets: Any) -> torch.Tensor:
    value: torch.Tensor = outputs["y"].square().mean()
    return value


def given(model: nn.Module, spec: TensorSpec | None = None) -> Workload:
    """A workload around `model` with random inputs."""
    spec = spec or TensorSpec("x", "float32", (BATCH, LENGTH, WIDTH))

    def batches(seed: int = 0) -> list[Batch]:
        return [Batch({spec.name: spec.generate(np.random.default_rng(seed), batch=8)})]

    def scores(outputs: Any, targets: Any, reference: Any) -> dict[str, Array]:
        return {"score": outputs["y"].reshape(len(outputs["y"]), -1).mean(1)}

    return Workload(
        *("given", model, (spec,), ("y",), lambda: batches(1), scores),
        calibration=batches,
        training=batches,
        loss=loss,
        higher_is_better={"score": True},
    )


def apply(config: object, workload: Workload, scratch: Path, told: Callable[[str, float], None] | None = None) -> Any:
    progress = told or (lambda text, fraction: None)
    context = Context(workload, workload.build(), Target(cores=1), 0, scratch, progress)
    return step.apply(config, workload.build(), context)


def answer(module: nn.Module, workload: Workload) -> Array:
    batch = next(iter(workload.batches("evaluation")))
    return TorchPredictor(module, workload.outputs).predict(batch.inputs)[workload.outputs[0]]


@torch.no_grad()
def silence(reader: nn.Linear, rows: slice, *projections: nn.Linear) -> None:
    """Make a unit that nobody reads and whose norm is the smallest."""
    reader.weight[:, rows] = 0
    for layer in projections:
        layer.weight[rows] /= 1000


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("other", [{}, {"bias": False}, {"kdim": 12, "vdim": 10}])
def test_our_attention_computes_what_torchs_does(masked: bool, batch_first: bool, other: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, batch_first=batch_first, **other).eval()
    nn.init.normal_(theirs.out_proj.weight)
    ours = Attention(theirs)
    inputs = [torch.randn(3, size, width) for size, width in ((5, 16), (7, theirs.kdim), (7, theirs.vdim))]
    inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    padding = torch.arange(7) >= torch.tensor([[7], [4], [2]])
    masks: list[dict[str, Any]] = [
        {"key_padding_mask": padding, "attn_mask": torch.ones(5, 7).triu(1).bool()},
        {"key_padding_mask": padding, "attn_mask": torch.randn(12, 5, 7), "need_weights": False},
        {"key_padding_mask": torch.randn(3, 7), "average_attn_weights": False},
    ]
    with torch.no_grad(), pytest.warns(UserWarning) if masked else torch.no_grad():
        for how in masks if masked else [{}, {"need_weights": False}]:
            torch.testing.assert_close(ours(*inputs, **how), theirs(*inputs, **how))
    alone = [x[0] if batch_first else x[:, 0] for x in inputs]
    torch.testing.assert_close(ours(*alone), theirs(*alone))


@pytest.mark.parametrize("order", ["one after the other", "by head", "last"])
def test_a_head_that_is_not_read_goes_without_a_trace(order: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = Own(order, inner=32)
    silence(attention.out, slice(8, 16))
    workload = given(Block(attention))
    with torch.no_grad():
        rows = torch.arange(96).view(3, 4, 8)[:, 1] if order == "one after the other" else torch.arange(24, 48)
        attention.qkv.weight[rows.flatten()] /= 1000
    pruned = apply(Heads(ratio=0.25), workload, tmp_path)
    assert (pruned.attention.num_heads, pruned.attention.head_dim) == (3, 8)
    assert (pruned.attention.qkv.out_features, pruned.attention.out.in_features) == (72, 24)
    np.testing.assert_allclose(answer(pruned, workload), answer(workload.build(), workload), atol=1e-5)


def test_separate_layers_and_what_a_head_has_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = Separate()
    silence(attention.wo, slice(4, 8), attention.wq, attention.wk, attention.wv)
    workload = given(attention)
    pruned = apply(Heads(ratio=0.25), workload, tmp_path)
    assert pruned.n_heads == 3 and pruned.temperature.shape == (3, 1, 1)
    assert torch.equal(pruned.temperature.flatten(), attention.temperature.flatten()[[0, 2, 3]])
    np.testing.assert_allclose(answer(pruned, workload), answer(attention, workload), atol=1e-5)


@pytest.mark.slow
def test_encoders_of_hugging_face(tmp_path: Path) -> None:
    import transformers

    class First(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(**inputs)[0]
            return out

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes), add_pooling_layer=False)
    own = bert.encoder.layer[1].attention
    silence(own.output.dense, slice(8, 16), own.self.query, own.self.key, own.self.value)
    tokens = given(First(bert), TensorSpec("input_ids", "int64", (BATCH, 6), values=(1, 49)))
    pruned = apply(Heads(ratio=0.25, exclude=("*layer.0.attention*",)), tokens, tmp_path)
    sizes_left = [
        (layer.attention.self.num_attention_heads, layer.attention.self.all_head_size)
        for layer in pruned.inner.encoder.layer
    ]
    assert sizes_left == [(4, 32), (3, 24)]
    np.testing.assert_allclose(answer(pruned, tokens), answer(tokens.build(), tokens), atol=1e-5)
    images = given(First(vit), TensorSpec("pixel_values", "float32", (BATCH, 3, 16, 16)))
    pruned = apply(Heads(ratio=0.5, ffn=0.5), images, tmp_path)
    assert {layer.attention.num_attention_heads for layer in pruned.inner.layers} == {2}
    assert {layer.mlp.fc1.out_features for layer in pruned.inner.layers} == {32}


def test_torchs_own_encoder_loses_heads_and_neurons_and_its_bundle_comes_back(
    encoder: Workload, tmp_path: Path
) -> None:
    pruned = apply(Heads(ratio=0.5, ffn=0.4, round_to=16), encoder, tmp_path)
    layer = pruned.encoder.layers[1]
    assert isinstance(layer.self_attn, Attention)
    assert (layer.self_attn.num_heads, layer.self_attn.q_proj.out_features) == (2, 16)
    # .6 of 64 is 38.4, nearest to 2 times 16.
    assert layer.linear1.out_features == layer.linear2.in_features == 32
    folder = bundles.save(bundles.Bundle(encoder, pruned), tmp_path / "bundle").folder
    assert folder
    loaded = bundles.load(folder).module
    assert np.array_equal(answer(loaded, encoder), answer(pruned, encoder))
    again = apply(Heads(ratio=0.5), replace(encoder, model=loaded), tmp_path)
    assert again.encoder.layers[0].self_attn.num_heads == 1
    # Two layers of q, k, v, out, two products of all heads and the feed-forward for twelve tokens, and the classifier.
    whole, half = 2 * 12 * 12 * 32, 2 * 12 * 12 * 16
    assert macs.total(encoder.build(), encoder.inputs) == 2 * (12 * (4 * 32 * 32 + 2 * 32 * 64) + whole) + 32 * 4
    assert macs.total(pruned, encoder.inputs) == 2 * (12 * (4 * 32 * 16 + 2 * 32 * 32) + half) + 32 * 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_on_torchs_fast_path_gives_the_same_without_it(encoder: Workload, tmp_path: Path) -> None:
    module: Any = encoder.build()
    module.encoder.enable_nested_tensor = module.encoder.use_nested_tensor = True
    workload = replace(encoder, model=module)
    with torch.no_grad():
        for layer in module.encoder.layers:
            layer.self_attn.out_proj.weight[:, :8] = 0
            layer.self_attn.in_proj_weight.view(3, 4, 8, 32)[:, 0] /= 1000
    pruned = apply(Heads(ratio=0.25), workload, tmp_path)
    assert {layer.self_attn.num_heads for layer in pruned.encoder.layers} == {3}
    np.testing.assert_allclose(answer(pruned, workload), answer(module, workload), atol=1e-4)


def test_the_loss_knows_what_the_norm_does_not(encoder: Workload, tmp_path: Path) -> None:
    module: Any = encoder.build()
    with torch.no_grad():
        for layer in module.encoder.layers:
            # The third head has the largest weights, and nothing to say.
            weight, bias = layer.self_attn.in_proj_weight.view(3, 4, 8, 32), layer.self_attn.in_proj_bias.view(3, 4, 8)
            weight[:2, 2] *= 10
            weight[2, 2], bias[2, 2] = 0, 0
            # So has the first neuron, whose input never passes the ReLU.
            layer.linear1.weight[0], layer.linear1.bias[0] = 0, -50
            layer.linear1.weight.requires_grad_(False)
    workload = replace(encoder, model=module)
    before = answer(module, workload)
    by_loss = apply(Heads(ratio=0.25, ffn=0.01, score="taylor"), workload, tmp_path)
    np.testing.assert_allclose(answer(by_loss, workload), before, atol=1e-4)
    assert by_loss.encoder.layers[0].linear1.out_features == 63
    assert not by_loss.encoder.layers[0].linear1.weight.requires_grad
    by_norm = apply(Heads(ratio=0.25, ffn=0.01), workload, tmp_path)
    assert np.abs(answer(by_norm, workload) - before).max() > 0.1


@pytest.mark.slow
def test_it_is_exported_and_takes_any_length(encoder: Workload, tmp_path: Path) -> None:
    pruned = apply(Heads(ratio=0.5, ffn=0.5), encoder, tmp_path)
    file = export(pruned, encoder.inputs, encoder.outputs, tmp_path / "model.onnx")
    with OnnxPredictor(file) as onnx:
        for length in (6, 12):
            tokens = np.random.default_rng(0).integers(0, 20, (3, length))
            tokens[:, :2] = 1
            got = onnx.predict({"tokens": tokens})["logits"]
            wanted = TorchPredictor(pruned, encoder.outputs).predict({"tokens": tokens})["logits"]
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_what_the_code_fixes_is_left_alone_and_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(Block(Own("fixed")), Block(Own("by head")))
    told: list[str] = []
    pruned = apply(Heads(ratio=0.5), given(stack, SEQUENCE), tmp_path, lambda text, fraction: told.append(text))
    assert [block.attention.num_heads for block in pruned] == [4, 2]
    assert any("left alone: 0.attention" in line for line in told)
    with pytest.raises(NoEffect) as raised:
        apply(Heads(ratio=0.5), given(stack[:1], SEQUENCE), tmp_path)
    assert "shared weights: 0.attention" in raised.value.fix


def test_weights_that_two_attentions_share_stay_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second, third = Separate(), Separate(), Separate()
    second.wq.weight = first.wq.weight
    pruned = apply(Heads(ratio=0.5), given(nn.Sequential(first, second, third), SEQUENCE), tmp_path)
    assert [attention.n_heads for attention in pruned] == [4, 4, 2]
    assert pruned[0].wq.weight is pruned[1].wq.weight


def test_refusals(small: Workload, encoder: Workload, tmp_path: Path) -> None:
    for values in ({"ratio": 1}, {"ratio": 1.5}, {"ffn": 1}, {"ratio": -0.1}, {"ratio": 0}):
        with pytest.raises(BadRecipe):
            recipe.build(Heads, values, "prune.heads")
    with pytest.raises(NoEffect, match="no attention") as raised:
        apply(Heads(), small, tmp_path)
    assert "query, key and value" in raised.value.fix
    with pytest.raises(NoEffect, match="less than one of"):
        apply(Heads(ratio=0.1), encoder, tmp_path)
    with pytest.raises(NoEffect, match="no layer matches 'nowhere'"):
        apply(Heads(exclude=("nowhere",)), encoder, tmp_path)
    single = Separate()
    single.n_heads, single.temperature = 1, nn.Parameter(torch.ones(1, 1, 1))
    with pytest.raises(NoEffect, match="no attention"):
        apply(Heads(), given(single), tmp_path)


class Alibi(nn.Module):
    """An attention whose heads have a slope each (Press et al., arXiv 2108.12409), in a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.06]).view(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        place = torch.arange(x.shape[1])
        weights = (q @ k.transpose(-2, -1) - (place[None] - place[:, None]).abs() * self.slopes).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_a_buffer_that_is_not_among_the_weights_comes_back_as_it_was(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (BATCH, 5, 16))
    batches = [Batch({"x": spec.generate(np.random.default_rng(0), 8)})]
    workload = Workload("alibi", Alibi, (spec,), ("y",), lambda: batches, lambda *_: {}, source="alibi.py:workload")
    pruned = apply(Heads(ratio=0.5), workload, tmp_path)
    assert pruned.slopes.shape == (2, 1, 1)
    bundles.save(bundles.Bundle(workload, pruned), tmp_path / "bundle")
    loaded = bundles.load(tmp_path / "bundle", workload).module
    assert torch.equal(loaded.slopes, pruned.slopes)
    wanted, got = (TorchPredictor(each, ("y",)).predict(batches[0].inputs)["y"] for each in (pruned, loaded))
    assert np.array_equal(got, wanted)
    # A file that lost them leaves nothing to guess with.
    (tmp_path / "bundle" / bundles.BUFFERS).unlink()
    described = json.loads((tmp_path / "bundle" / bundles.DESCRIPTION).read_text())
    del described["digests"][bundles.BUFFERS]
    (tmp_path / "bundle" / bundles.DESCRIPTION).write_text(json.dumps(described))
    with pytest.raises(BadBundle, match="do not fit"):
        bundles.load(tmp_path / "bundle", workload)


def test_a_bundle_keeps_no_buffer_that_the_users_code_builds(tmp_path: Path) -> None:
    spec = TensorSpec("x", "float32", (BATCH, 5, 16))
    workload = Workload("alibi", Alibi, (spec,), ("y",), lambda: [], lambda *_: {}, source="alibi.py:workload")
    bundles.save(bundles.Bundle(workload, workload.build()), tmp_path / "bundle")
    assert not (tmp_path / "bundle" / bundles.BUFFERS).exists()
