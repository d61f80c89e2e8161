"""Padding is no data: whatever is taken from a set is the same however far its rows are filled up."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from modelathe.tensors import BATCH, Array, Dim, TensorSpec
from optimize.methods.distill import layers, logits, relations
from optimize.methods.export.onnx import export
from optimize.methods.prune import importance
from optimize.methods.prune import layers as depth
from optimize.methods.prune.sparse import grams
from optimize.methods.quantize import calibrate, fp8, smooth, static
from optimize.model.errors import BadWorkload
from optimize.source import padding
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from optimize.train import fit as train
from serve.config.target import Target
from serve.repository import scratch

WIDTH, LONGEST = 8, 12
FREE = Dim("length", 2, 6, 64)


class Blocks(nn.Module):
    """Two blocks over token vectors; padding has vectors of its own, a hundred times as large as those of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        with torch.no_grad():
            self.table.weight[0] = 100 * torch.randn(WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        seen = (ids != 0).unsqueeze(-1)
        return (x * seen).sum(1) / seen.sum(1).clamp(min=1)


def rows(count: int = 24) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 20, rng.integers(3, 7)) for _ in range(count)]


def workload(length: int, left: bool = False, fixed: bool = False) -> Workload:
    """The same texts, filled up to `length` with padding behind them, or in front."""

    def batches() -> list[Batch]:
        filled = np.zeros((24, length), np.int64)
        for row, text in zip(filled, rows(), strict=True):
            row[slice(length - len(text), None) if left else slice(len(text))] = text
        return [Batch({"ids": filled[start : start + 8]}) for start in (0, 8, 16)]

    spec = TensorSpec("ids", "int64", (BATCH, length if fixed else FREE), (0, 19))
    return Workload(
        *("padded", Blocks().eval(), (spec,), ("y",), batches, lambda *_: {}, batches, batches),
        mask=lambda inputs: inputs["ids"] != 0,
    )


def context(made: Workload, folder: Path) -> Context:
    return Context(made, made.build(), Target(cores=1), 0, folder, lambda text, fraction: None)


def gram(made: Workload, folder: Path) -> Any:
    module = made.build()
    sums = grams(module, ["blocks.1.0", "conv"], made)
    return [sums[id(module.get_submodule(name).weight)].numpy() for name in ("blocks.1.0", "conv")]


def activation(made: Workload, folder: Path) -> Any:
    module = made.build()
    salient = importance.saliency("activation", module, context(made, folder))
    scores = [salient(module.get_submodule(name), "in")[0] for name in ("blocks.1.0", "conv")]
    return [score / score.sum() for score in scores]


def similarity(made: Workload, folder: Path) -> Any:
    return list(depth._influence(made.build(), ["blocks.0", "blocks.1"], context(made, folder)).values())


@functools.cache
def exported(fixed: int) -> bytes:
    """Return the ONNX file of the model for a fixed length, or for any: 0."""
    made = workload(fixed or 6, fixed=bool(fixed))
    with scratch.folder() as folder:
        return export(made.build(), made.inputs, made.outputs, folder / "model.onnx").read_bytes()


def graph_of(made: Workload, folder: Path) -> Path:
    length = made.inputs[0].dims[1]
    path = folder / "model.onnx"
    path.write_bytes(exported(length if isinstance(length, int) else 0))
    return path


def scales(method: Any, config: Any) -> Callable[[Workload, Path], Any]:
    """Return the constants that a method of the graph writes beside the weights of the first dense layer."""

    def take(made: Workload, folder: Path) -> Any:
        path = graph_of(made, folder)
        method.apply(config, path, context(made, folder))
        arrays = [numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer]
        return sorted(float(array) for array in arrays if array.dtype == np.float32 and array.size == 1)

    return take


def smoothed(made: Workload, folder: Path) -> Any:
    path, mask = graph_of(made, folder), functools.partial(padding.mask, made)
    names = list(smooth._layers(smooth.graph.load(path), []))
    return list(smooth.ranges.by_channel(path, names, calibrate.samples(made, 24), mask).values())


TAKEN = {
    "wanda and sparsegpt": gram,
    "activation": activation,
    "similarity": similarity,
    "smooth": smoothed,
    "fp8": scales(fp8, fp8.Fp8()),
    "static, minmax": scales(static, static.Static()),
    "static, percentile": scales(static, static.Static(calibrator="percentile")),
}


def same(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(
        np.allclose(one, two, rtol=1e-3, atol=1e-6) for one, two in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_taken_from_calibration_does_not_know_how_far_rows_are_filled_up(what: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("short", "long", "blind")]
    for folder in folders:
        folder.mkdir()
    short, long = (TAKEN[what](workload(length), folder) for length, folder in zip((6, LONGEST), folders, strict=False))
    assert same(short, long)
    blind = replace(workload(LONGEST), mask=None)
    assert not same(short, TAKEN[what](blind, folders[2])), "the padding would have been seen"


@pytest.mark.parametrize("what", [gram, activation, similarity, smoothed])
def test_a_fixed_length_keeps_its_padding_out_where_layers_are_watched(what: Any, tmp_path: Path) -> None:
    assert same(what(workload(6), tmp_path), what(workload(LONGEST, fixed=True), tmp_path))


def test_padding_is_cut_off_at_either_end_and_samples_of_one_length_come_together() -> None:
    for left in (False, True):
        made = workload(LONGEST, left)
        found = list(padding.stripped(made, made.batches("calibration")))
        assert {batch["ids"].shape[1] for batch in found} == {len(row) for row in rows()}
        assert sorted(row.tolist() for batch in found for row in batch["ids"]) == sorted(row.tolist() for row in rows())


def test_a_row_of_padding_keeps_the_smallest_size() -> None:
    made = workload(LONGEST)
    (batch,) = padding.stripped(made, [Batch({"ids": np.zeros((1, LONGEST), np.int64)})])
    assert batch["ids"].shape == (1, FREE.minimum)


def test_an_attention_mask_says_it_unless_the_workload_does() -> None:
    made = replace(workload(LONGEST), mask=None)
    inputs = {"ids": np.ones((2, 3), np.int64), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    found = padding.mask(made, inputs)
    assert found is not None
    assert found.tolist() == [[True, True, False], [True, False, False]]
    assert padding.mask(made, {"ids": inputs["ids"]}) is None
    with pytest.raises(BadWorkload, match=r"mask\(\) returned the shape \(3,\)"):
        padding.mask(replace(made, mask=lambda inputs: inputs["ids"][0]), inputs)


WHERE = torch.tensor([[True] * 4, [True, True, False, False]])


def noisy(values: torch.Tensor) -> torch.Tensor:
    """Return values [2, 4, …] with other numbers where there is padding."""
    return values.where(WHERE.reshape(2, 4, *[1] * (values.dim() - 2)), 100 * torch.randn(values.shape))


LOSSES = {
    "logits": lambda mine, theirs, where: logits.loss(mine, theirs, 2.0, 0, where),
    "relations": relations.loss,
    "features, mse": lambda mine, theirs, where: layers.distance(mine, theirs, "mse", where),
    "features, cosine": lambda mine, theirs, where: layers.distance(mine, theirs, "cosine", where),
    "outputs": lambda mine, theirs, where: train.difference({"y": mine}, {"y": theirs}, where),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_no_loss_between_models_sees_padding(loss: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    mine, theirs = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3)
    value = loss(mine, theirs, WHERE)
    with torch.no_grad():
        others = noisy(mine), noisy(theirs)
        assert loss(*others, WHERE).item() == pytest.approx(value.item())
        assert loss(*others, None).item() != pytest.approx(value.item())
    value.backward()
    assert mine.grad is not None
    assert not mine.grad[~WHERE].any()
    assert mine.grad[WHERE].any()


def test_attention_maps_lose_the_rows_of_padding() -> None:
    maps = torch.rand(2, 3, 4, 4)
    assert padding.kept(maps, WHERE).shape == (6, 3, 4)
    assert not padding.silenced(maps, WHERE)[1, :, 2:].any()
    assert padding.kept(torch.rand(2, 4), WHERE).shape == (2, 4), "one vector for a sample"


def test_a_distillation_asks_the_workload_where_the_tokens_are(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.table = nn.Embedding(20, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids)

    made = replace(workload(LONGEST), model=Tagger)
    trained = made.build()
    with torch.no_grad():
        trained.table.weight[0] = 50 * torch.randn(5)
    student = made.build()
    logits.apply(logits.Logits(epochs=1), student, replace(context(made, tmp_path), trained=trained))
    # No gradient moves the padding's row, though the trained model has another one; the weights decay a little.
    assert torch.allclose(student.table.weight[0], made.build().table.weight[0], atol=1e-3)
