"""Whoever takes a part of a set takes it from all of the set, and training sees it in a new order each epoch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from modelathe.tensors import BATCH, Arrays, Dim, TensorSpec
from optimize.methods.prune import heads, importance
from optimize.methods.prune.units import Slice, Units
from optimize.methods.quantize import calibrate
from optimize.source import huggingface, padding, sample, texts
from optimize.source.batch import Batch
from optimize.source.workload import Workload
from optimize.step.contract import Context
from serve.config.target import Target
from tests.optimize.source.test_huggingface import WORDS, text_folder

SAMPLES = 4000


def sorted_by_length() -> Iterator[Batch]:
    """Texts of 2 to 41 tokens in the order of their length, a hundred of each; each token is the text's length."""
    for start in range(0, SAMPLES, 32):
        lengths = 2 + np.arange(start, start + 32) // 100
        ids = np.where(np.arange(lengths.max()) < lengths[:, None], lengths[:, None], 0)
        yield Batch({"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}, lengths)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.out(self.scale((input_ids * attention_mask).float().mean(1, keepdim=True)))


@pytest.fixture
def workload() -> Workload:
    size = Dim("tokens", 2, 20, 64)
    specs = tuple(TensorSpec(name, "int64", (BATCH, size), (0, 41)) for name in ("input_ids", "attention_mask"))
    return Workload(
        *("texts", Sum, specs, ("y",), sorted_by_length, lambda outputs, targets, reference: {"s": targets}),
        *(sorted_by_length, sorted_by_length),
        loss=lambda outputs, targets: (outputs["y"][:, 0] - targets).square().mean(),
    )


def lengths(batches: Iterator[Arrays]) -> list[int]:
    return [int(row.max()) for batch in batches for row in batch["input_ids"]]


def spread(found: list[int]) -> None:
    """Hold lengths against those of the set: 2 to 41, as many of each."""
    assert abs(np.mean(found) - 21.5) < 2.5
    assert min(found) < 6
    assert max(found) > 37


def test_calibration_sees_every_length(workload: Workload) -> None:
    batches = list(calibrate.samples(workload, 256))
    found = lengths(iter(batches))
    assert len(found) == 256
    spread(found)
    assert found == lengths(calibrate.samples(workload, 256)), "the same samples in every run"
    assert {batch["input_ids"].shape[1] for batch in batches} == set(found), "none of their padding"


def test_gradients_come_from_batches_of_the_whole_epoch(
    workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def loss(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        seen.extend(targets.tolist())
        return outputs["y"].sum()

    watched = replace(workload, loss=loss)
    context = Context(watched, watched.build(), Target(cores=1), 0, tmp_path, lambda text, fraction: None)
    importance.saliency("taylor", watched.build(), context)
    spread(seen)
    seen.clear()
    column = Slice("scale", "weight", 1, torch.tensor([[0]]))
    heads._sensitivities(watched.build(), [Units("scale", 1, (column,), (), "scale")], context)
    spread(seen)


def test_whole_batches_and_rows_are_drawn_once_and_in_order(workload: Workload) -> None:
    few = [int(batch.targets[0]) for batch in sample.batches(workload, "training", 7, seed=3)]
    assert len(few) == 7
    assert few == sorted(few)
    assert len(list(sample.batches(workload, "training", 1000))) == SAMPLES / 32
    drawn = [row for batch in sample.rows(workload, "training", 500) for row in batch.targets]
    assert len(drawn) == 500
    assert drawn == sorted(drawn)
    assert sum(len(batch.targets) for batch in sample.rows(workload, "training", 9999)) == SAMPLES


def test_a_set_without_an_end_is_looked_at_for_a_while(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[Batch]:
        while True:
            yield from sorted_by_length()

    unending = replace(workload, training=endless, calibration=endless)
    assert len(list(sample.batches(unending, "training", 5))) == 5
    monkeypatch.setattr(sample, "MOST", 2 * SAMPLES)
    assert sum(len(batch.targets) for batch in sample.rows(unending, "calibration", 500)) == 500
    assert sum(len(inputs["input_ids"]) for inputs, _ in padding.calibration(unending)) == 2 * SAMPLES


def test_targets_by_name_go_with_their_rows(workload: Workload) -> None:
    def named() -> Iterator[Batch]:
        return (
            Batch(batch.inputs, {"length": batch.targets, "twice": 2 * batch.targets}) for batch in sorted_by_length()
        )

    for batch in sample.rows(replace(workload, training=named), "training", 10):
        assert batch.targets["length"].tolist() == batch.inputs["input_ids"].max(1).tolist()
        assert (batch.targets["twice"] == 2 * batch.targets["length"]).all()


def test_shuffled_texts_come_once_in_batches_of_like_lengths() -> None:
    tokens = [[1] * (2 + number // 100) for number in range(SAMPLES)]
    rng = np.random.default_rng(0)
    order = texts.shuffled(tokens, rng.permutation(SAMPLES).tolist(), rng.random(SAMPLES).tolist())
    assert sorted(order) == list(range(SAMPLES))
    found = [[len(tokens[index]) for index in order[start : start + 32]] for start in range(0, SAMPLES, 32)]
    spread([length for batch in found[:32] for length in batch])
    padded = sum(max(batch) * len(batch) - sum(batch) for batch in found)
    assert padded < 0.15 * sum(map(len, tokens)), "a random order would add two thirds"


def test_a_folder_of_texts_is_shuffled_anew_in_each_epoch_and_by_the_seed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = text_folder(tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS, length)) for length in rng.integers(1, 30, 400)]
    (folder / "texts.txt").write_text("\n".join(lines))
    made = huggingface.workload(folder)
    assert made.training is not None

    def epoch() -> list[int]:
        return [int(row.sum()) for batch in made.batches("training") for row in batch.inputs["attention_mask"]]

    torch.manual_seed(0)
    first, second = epoch(), epoch()
    torch.manual_seed(0)
    assert epoch() == first != second
    assert sorted(first) == sorted(second)
    assert first != sorted(first)
