from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from modelathe.tensors import BATCH, Array, TensorSpec
from optimize.methods import apply as step
from optimize.methods.prune import sparse
from optimize.methods.prune.weights import Weights
from optimize.methods.table import METHODS
from optimize.model.errors import BadRecipe, NoEffect
from optimize.predict.module import TorchPredictor
from optimize.runs import recipe
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step import bundle as bundles
from optimize.step.contract import Context
from serve.config.target import Target

Score = Literal["magnitude", "wanda", "sparsegpt"]
SCORES: tuple[Score, ...] = get_args(Score)
Pattern = Literal["2:4", "4:8"]


def given(model: nn.Module, spec: TensorSpec) -> Workload:
    def batches(seed: int = 0) -> list[Batch]:
        return [Batch({spec.name: spec.generate(np.random.default_rng(seed), batch=64)})]

    def scores(outputs: Any, targets: Any, reference: Any) -> dict[str, Array]:
        return {"score": outputs["y"].reshape(len(outputs["y"]), -1).mean(1)}

    return Workload(
        *("given", model, (spec,), ("y",), lambda: batches(1), scores),
        calibration=batches,
        higher_is_better={"score": True},
    )


def apply(config: object, workload: Workload, scratch: Path, told: Callable[[str, float], None] | None = None) -> Any:
    progress = told or (lambda text, fraction: None)
    context = Context(workload, workload.build(), Target(cores=1), 0, scratch, progress)
    return step.apply(config, workload.build(), context)


def layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, sparse.Layer)]


@pytest.mark.parametrize("score", SCORES)
def test_the_share_is_exact_in_every_layer(score: Score, small: Workload, tmp_path: Path) -> None:
    pruned = apply(Weights(ratio=0.25, score=score, exclude=("out",)), small, tmp_path)
    assert not (pruned.out.weight == 0).any()
    for layer in (pruned.hidden, pruned.wide):
        gone = layer.weight == 0
        assert int(gone.sum()) == pytest.approx(gone.numel() / 4, abs=1)
        if score == "wanda":
            assert set(gone.sum(1).tolist()) == {gone.shape[1] // 4}
    if score == "magnitude":
        before = small.build().get_parameter("wide.weight")
        assert before[pruned.wide.weight == 0].abs().max() <= before[pruned.wide.weight != 0].abs().min()


def test_all_layers_together_keep_the_largest_weights(small: Workload, tmp_path: Path) -> None:
    pruned, before = apply(Weights(ratio=0.5, scope="global"), small, tmp_path), layers(small.build())
    gone = torch.cat([layer.weight.flatten() == 0 for layer in layers(pruned)])
    sizes = torch.cat([layer.weight.abs().flatten() for layer in before])
    assert int(gone.sum()) == round(len(gone) / 2)
    assert sizes[gone].max() <= sizes[~gone].min()
    shares = [float((layer.weight == 0).float().mean()) for layer in layers(pruned)]
    assert max(shares) - min(shares) > 0.1


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_a_pattern_holds_in_every_group_of_input_channels(
    score: Score, pattern: Pattern, kept: int, of: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), nn.Flatten(), nn.Linear(32 * 16, 5)
    )
    told: list[str] = []
    workload = given(model, TensorSpec("input", "float32", (BATCH, 3, 8, 8)))
    pruned = apply(Weights(pattern=pattern, score=score), workload, tmp_path, lambda text, fraction: told.append(text))
    assert torch.equal(pruned[0].weight, model.get_parameter("0.weight"))
    assert "prune.weights: left alone: 0" in told
    for layer in (pruned[2], pruned[4]):
        groups = layer.weight.detach().movedim(1, -1).reshape(-1, of)
        assert set((groups != 0).sum(1).tolist()) == {kept}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (4, 7, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
        (nn.Conv2d(4, 8, (3, 2), padding=(1, 0), padding_mode="circular", dilation=2), (2, 4, 9, 9)),
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
        (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    ],
    ids=["linear", "grouped", "circular", "1d", "depthwise"],
)
def test_the_matrix_times_its_columns_is_the_layer(layer: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    product = sparse.matrix(layer) @ sparse.columns(layer, x).transpose(1, 2)
    layer.bias = None
    wanted = layer(x).detach().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    torch.testing.assert_close(product.flatten(0, 1), wanted)
    before = layer.weight.detach().clone()
    sparse.set_matrix(layer, sparse.matrix(layer))
    assert torch.equal(layer.weight, before)


def test_the_more_a_score_knows_of_the_inputs_the_closer_the_layer_stays(small: Workload, tmp_path: Path) -> None:
    trained: Any = small.build()
    grams = sparse.grams(trained, ["hidden"], small)[id(trained.hidden.weight)][0]
    errors = {}
    for score in SCORES:
        pruned = apply(Weights(ratio=0.6, score=score), small, tmp_path)
        change = (pruned.hidden.weight - trained.hidden.weight).detach()
        errors[score] = float(((change @ grams) * change).sum())
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]
    assert errors["wanda"] < 0.8 * errors["magnitude"]


def test_sparsegpt_moves_a_weight_to_the_input_that_says_the_same() -> None:
    torch.manual_seed(0)
    x = torch.randn(100, 8).repeat(1, 2)
    weight = 1 + torch.rand(6, 16)
    new = sparse.reconstruct(weight, x.T @ x, 0.5, None)
    assert int((new == 0).sum()) == 6 * 8
    wanted = x @ weight.T
    assert (x @ new.T - wanted).norm() < 0.02 * wanted.norm()
    kept = weight.masked_fill(sparse.lowest(weight.abs(), 8), 0)
    assert (x @ kept.T - wanted).norm() > 0.2 * wanted.norm()
    # An input that is always zero costs nothing.
    x[:, :4] = 0
    assert not sparse.reconstruct(weight, x.T @ x, 0.25, None)[:, :4].any()


class Tied(nn.Module):
    """A table that is embedding and output at once, a layer used twice, and one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.idle = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.twice(functional.relu(self.twice(self.table(x)))).mean(1))
        return out


def test_tied_and_idle_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    workload = given(Tied(), TensorSpec("x", "int64", (BATCH, 6), values=(0, 19)))
    told: list[str] = []
    pruned = apply(Weights(score="wanda"), workload, tmp_path, lambda text, fraction: told.append(text))
    assert "prune.weights: left alone: idle, out" in told
    assert pruned.out.weight is pruned.table.weight and not (pruned.table.weight == 0).any()
    assert (pruned.twice.weight == 0).sum() == 32
    with pytest.raises(NoEffect) as raised:
        apply(Weights(score="wanda", exclude=("twice",)), workload, tmp_path)
    assert "idle, out; excluded: twice" in raised.value.fix


def test_torchs_own_attention_is_pruned_too_and_its_bundle_comes_back(encoder: Workload, tmp_path: Path) -> None:
    pruned = apply(Weights(score="wanda", pattern="2:4"), encoder, tmp_path)
    assert all(int((layer.weight == 0).sum()) * 2 == layer.weight.numel() for layer in layers(pruned))
    folder = bundles.save(bundles.Bundle(encoder, pruned), tmp_path / "bundle").folder
    assert folder
    batch = next(iter(encoder.batches("evaluation"))).inputs
    wanted, got = (
        TorchPredictor(module, encoder.outputs).predict(batch)["logits"]
        for module in (pruned, bundles.load(folder).module)
    )
    assert np.array_equal(wanted, got)


def test_refusals(small: Workload, tmp_path: Path) -> None:
    for values in ({"ratio": 0}, {"ratio": 1}, {"ratio": 1.5}, {"pattern": "3:4"}):
        with pytest.raises(BadRecipe):
            recipe.build(Weights, values, "prune.weights")
    for values in ({"scope": "global", "score": "wanda"}, {"scope": "global", "pattern": "2:4"}):
        with pytest.raises(BadRecipe) as raised:
            recipe.build(Weights, values, "prune.weights")
        assert raised.value.fix == "global goes with the score magnitude and without a pattern"
    with pytest.raises(NoEffect, match="no layer matches 'nowhere'"):
        apply(Weights(exclude=("nowhere",)), small, tmp_path)
    # Neither file size nor ONNX Runtime gains, so nothing is promised.
    assert METHODS[Weights].promises == frozenset()


def test_the_command_knows_the_choices_of_every_method_and_whose_they_are(optimize: Callable[..., Any]) -> None:
    text = " ".join(optimize("prune", "--help").out.split())
    assert all(choice in text for choice in ("taylor", "similarity", "sparsegpt"))
    assert "layers: How many blocks are removed." in text
    assert "weights: Keep N of every M weights" in text and "ONNX Runtime gains from no zeros" in text
