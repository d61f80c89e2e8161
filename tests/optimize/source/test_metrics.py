"""Metrics by name, beside scikit-learn's or by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch.nn import functional

from optimize.model.errors import BadWorkload
from optimize.source import losses, metrics

RNG = np.random.default_rng(0)


def figure(name: str, outputs: np.ndarray, targets: np.ndarray) -> float:
    chosen = metrics.named(name, outputs, targets)
    samples = chosen.judge(outputs, targets)
    assert samples.shape == (len(outputs),) and samples.dtype == np.float64
    return chosen.aggregate(samples)


@pytest.mark.parametrize("classes", [2, 5])
def test_one_label_of_several(classes: int) -> None:
    outputs, targets = RNG.normal(size=(300, classes)), RNG.integers(0, classes, 300)
    said = outputs.argmax(1)
    assert figure("accuracy", outputs, targets) == pytest.approx(sklearn.accuracy_score(targets, said))
    how = "binary" if classes == 2 else "macro"
    assert figure("f1", outputs, targets) == pytest.approx(sklearn.f1_score(targets, said, average=how))
    loss = functional.cross_entropy(torch.tensor(outputs), torch.tensor(targets))
    assert figure("perplexity", outputs, targets) == pytest.approx(float(loss.exp()))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "a column", "two logits"])
def test_a_label_that_is_there_or_not(kind: str) -> None:
    targets = RNG.integers(0, 2, 300)
    logits = RNG.normal(size=300) + targets
    outputs = {
        "logits": logits,
        "probabilities": 1 / (1 + np.exp(-logits)),
        "a column": logits[:, None],
        "two logits": np.stack([np.zeros(300), logits], 1),
    }[kind]
    assert figure("accuracy", outputs, targets) == pytest.approx(np.mean((logits > 0) == targets))
    assert figure("f1", outputs, targets) == pytest.approx(sklearn.f1_score(targets, logits > 0))
    assert figure("auroc", outputs, targets) == pytest.approx(sklearn.roc_auc_score(targets, logits))


def test_a_class_by_a_1_among_zeros() -> None:
    outputs, targets = RNG.normal(size=(90, 4)), RNG.integers(0, 4, 90)
    for name in ("accuracy", "f1"):
        assert figure(name, outputs, np.eye(4)[targets]) == figure(name, outputs, targets)
    several = (RNG.random((90, 4)) > 0.5).astype(int)
    assert figure("accuracy", outputs, several) == pytest.approx(np.mean((outputs > 0) == several))


def test_ties_count_half() -> None:
    outputs, targets = RNG.integers(0, 4, 200).astype(float), RNG.integers(0, 2, 200)
    assert figure("auroc", outputs, targets) == pytest.approx(sklearn.roc_auc_score(targets, outputs))


def test_right_is_more_than_wrong_in_every_sample() -> None:
    """So that the samples that got worse are those that became wrong."""
    targets = np.repeat(np.arange(5), 5)
    outputs = np.eye(5)[np.tile(np.arange(5), 5)]
    samples = metrics.f1(outputs, targets).reshape(5, 5)
    for label, row in enumerate(samples):
        assert row.argmax() == label and np.sum(row == row.max()) == 1


@pytest.mark.parametrize("axis", [1, -1])
def test_a_label_at_each_place(axis: int) -> None:
    targets = RNG.integers(0, 4, (20, 6, 7))
    outputs = RNG.normal(size=(20, 4, 6, 7))
    said = outputs.argmax(1)
    outputs = np.moveaxis(outputs, 1, axis)
    assert figure("accuracy", outputs, targets) == pytest.approx(np.mean(said == targets))
    by_hand = [
        np.mean(sklearn.jaccard_score(one.ravel(), other.ravel(), labels=np.union1d(one, other), average=None))
        for one, other in zip(targets, said, strict=True)
    ]
    assert figure("iou", outputs, targets) == pytest.approx(np.mean(by_hand))


def test_places_that_are_not_judged_do_not_count() -> None:
    targets = RNG.integers(0, 3, (10, 8))
    outputs = RNG.normal(size=(10, 8, 3))
    right = outputs.argmax(-1) == targets
    hidden = np.where(np.arange(8) < 5, targets, metrics.IGNORED)
    assert figure("accuracy", outputs, hidden) == pytest.approx(np.mean(right[:, :5]))
    logs = functional.cross_entropy(torch.tensor(outputs).movedim(-1, 1), torch.tensor(hidden))
    assert figure("perplexity", outputs, hidden) == pytest.approx(float(logs.exp()))


def test_a_mask_of_one_kind_of_thing() -> None:
    targets = (RNG.random((12, 1, 5, 5)) > 0.6).astype(np.int64)
    outputs = RNG.normal(size=(12, 1, 5, 5))
    by_hand = [
        sklearn.jaccard_score(one.ravel(), other.ravel() > 0) for one, other in zip(targets, outputs, strict=True)
    ]
    assert figure("iou", outputs, targets) == pytest.approx(np.mean(by_hand))
    assert figure("iou", outputs[:, 0], targets[:, 0]) == pytest.approx(np.mean(by_hand))


def test_numbers() -> None:
    outputs, targets = RNG.normal(size=(50, 3)), RNG.normal(size=(50, 3))
    assert figure("mse", outputs, targets) == pytest.approx(np.mean((outputs - targets) ** 2))
    assert figure("rmse", outputs, targets) == pytest.approx(np.sqrt(np.mean((outputs - targets) ** 2)))
    assert figure("mae", outputs[:, :1], targets[:, 0]) == pytest.approx(np.mean(abs(outputs[:, 0] - targets[:, 0])))


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [("accuracy", (9, 3, 4), (9, 5)), ("auroc", (9, 3), (9,)), ("mse", (9, 3), (9, 2)), ("perplexity", (9,), (9,))],
)
def test_what_does_not_go_together_is_said(name: str, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(BadWorkload, match="do not go together"):
        figure(name, np.full(outputs, 2.0), np.zeros(targets, np.int64))


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("cross_entropy", (6, 3), (6,)),
        ("cross_entropy", (6, 3, 4, 5), (6, 4, 5)),
        ("cross_entropy", (6, 4, 3), (6, 4)),
        ("cross_entropy", (6, 3), (6, 3)),
        ("bce", (6, 1), (6,)),
        ("mse", (6, 1), (6,)),
        ("l1", (6, 2), (6, 2)),
    ],
)
def test_a_loss_by_name(name: str, outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    given = torch.randn(outputs, requires_grad=True)
    labels = torch.randint(0, 2, targets)
    value = losses.named(name)({"first": given}, labels)
    value.backward()
    assert value.shape == () and given.grad is not None and bool((given.grad != 0).any())
