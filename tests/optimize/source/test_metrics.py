"""Metrics by name, beside scikit-learn's or by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch.nn import functional

from optimize.judge import intervals
from optimize.model.errors import BadWorkload
from optimize.source import losses, metrics

RNG = np.random.default_rng(0)
DRAWS = 100
"""Of two models each, in a simulation of how often an interval holds the truth."""


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 300)


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
    if classes == 2:
        assert figure("f1", outputs, targets) == pytest.approx(sklearn.f1_score(targets, said))
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


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("size", "share", "flips"), [(24, 0.5, 0.0), (100, 0.1, 0.02), (500, 0.3, 0.2)])
def test_the_interval_of_an_f1_holds_the_truth(size: int, share: float, flips: float) -> None:
    """Two models that are right as often, of whose labels some differ; where none does, the interval is not nothing."""
    rng, held = np.random.default_rng(1), []
    for _ in range(DRAWS):
        targets = (rng.random(size) < share).astype(np.int64)
        one, other = (np.where(rng.random(size) < flips, 1 - targets, targets) for _ in range(2))
        first, second = (metrics.f1(said - 0.5, targets) for said in (one, other))
        low, high = intervals.of_difference(first, second, metrics.f1_of, True)(size)
        held.append(low <= 0 <= high and low < high)
    assert np.mean(held) >= 0.93


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("size", "share", "noise"), [(24, 0.5, 0.0), (100, 0.1, 2.0), (500, 0.3, 0.5)])
def test_the_interval_of_an_auroc_holds_the_truth(size: int, share: float, noise: float) -> None:
    """Two models that know the same and are wrong by chance; where they are one, the interval is not nothing."""
    rng, held = np.random.default_rng(1), []
    for _ in range(DRAWS):
        targets = (rng.permutation(size) < share * size).astype(np.int64)
        known = rng.normal(size=size) + 1.5 * targets
        first, second = (metrics.auroc(known + noise * rng.normal(size=size), targets) for _ in range(2))
        low, high = intervals.of_difference(first, second, metrics.auroc_of, True)(size)
        held.append(low <= 0 <= high and low < high)
    assert np.mean(held) >= 0.93


def test_ties_of_an_auroc_count_half() -> None:
    outputs, targets = RNG.integers(0, 4, 200).astype(float), RNG.integers(0, 2, 200)
    assert figure("auroc", outputs, targets) == pytest.approx(sklearn.roc_auc_score(targets, outputs))


def test_an_auroc_tells_large_logits_apart() -> None:
    outputs, targets = (1e6 + np.arange(200)).astype(np.float32), RNG.integers(0, 2, 200)
    for moved in (outputs, -outputs):
        assert figure("auroc", moved, targets) == pytest.approx(sklearn.roc_auc_score(targets, moved))


def test_an_auroc_needs_both_labels() -> None:
    with pytest.raises(BadWorkload, match="all targets are 1"):
        figure("auroc", RNG.normal(size=9), np.ones(9, np.int64))


def test_an_f1_without_a_flip_is_not_certain() -> None:
    targets = np.tile([0, 1], 12)
    samples = metrics.f1(targets - 0.5, targets)
    assert metrics.f1_of(samples) == 1
    assert intervals.of_score(samples, metrics.f1_of, True)[0] < 0.9
    low, high = intervals.of_difference(samples, samples, metrics.f1_of, True)(24)
    assert low < -0.05 and high > 0.05


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


@pytest.mark.parametrize("name", ["accuracy", "iou", "perplexity"])
def test_a_sample_without_anything_to_judge_is_no_mistake_of_a_model(name: str) -> None:
    targets = np.where(np.arange(6)[:, None] < 2, metrics.IGNORED, RNG.integers(0, 3, (6, 5)))
    with pytest.raises(BadWorkload, match="2 of 6 samples have no label that is judged"):
        figure(name, RNG.normal(size=(6, 5, 3)), targets)


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
    [
        ("accuracy", (9, 3, 4), (9, 5)),
        ("accuracy", (9, 4, 4), (9, 4)),
        ("f1", (9, 3, 4), (9, 3)),
        ("auroc", (9, 3), (9,)),
        ("auroc", (9, 2), (9, 2)),
        ("mse", (9, 3), (9, 2)),
        ("perplexity", (9,), (9,)),
        ("word_error_rate", (9,), (9,)),
        ("word_error_rate", (9, 3), (8, 3)),
    ],
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


@pytest.mark.parametrize("classes", [3, 12])
def test_an_f1_of_several_labels_is_their_mean(classes: int) -> None:
    targets = RNG.integers(0, classes, 40)
    outputs = RNG.normal(size=(40, classes)) + 2 * np.eye(classes)[targets]
    wanted = sklearn.f1_score(targets, outputs.argmax(1), average="macro")
    assert figure("f1", outputs, targets) == pytest.approx(wanted)
    samples = metrics.macro_f1(outputs, targets)
    assert samples[outputs.argmax(1) == targets].min() > samples[outputs.argmax(1) != targets].max()


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("size", "classes", "flips"), [(24, 3, 0.0), (100, 10, 0.1), (500, 3, 0.3)])
def test_the_interval_of_an_f1_of_several_labels_holds_the_truth(size: int, classes: int, flips: float) -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(3 * DRAWS):
        targets = rng.integers(0, classes, size)
        said = (np.where(rng.random(size) < flips, rng.integers(0, classes, size), targets) for _ in range(2))
        first, second = (metrics.macro_f1(np.eye(classes)[labels], targets) for labels in said)
        low, high = intervals.of_difference(first, second, np.mean, True)(size)
        held.append(low <= 0 <= high and low < high)
    assert np.mean(held) >= 0.93


@pytest.mark.parametrize("name", ["accuracy", "f1", "iou"])
def test_a_target_that_is_no_number_is_no_label(name: str) -> None:
    targets = np.array([0.0, 1.0, np.nan])
    with pytest.raises(BadWorkload, match="some targets are NaN"):
        figure(name, np.array([-1.0, 1.0, -1.0]), targets)


def test_word_error_rate_is_torchmetrics() -> None:
    from torchmetrics.functional.text import word_error_rate

    rng = np.random.default_rng(5)
    said, right = (rng.integers(1, 4, (40, 9)) for _ in range(2))
    for rows in (said, right):
        for row in rows:
            row[rng.integers(0, 10) :] = metrics.IGNORED
    text = [[" ".join(map(str, row[row > 0])) for row in rows] for rows in (said, right)]
    wanted = float(word_error_rate(*text))
    assert figure("word_error_rate", said, right) == pytest.approx(wanted)
    # As CTC says it: each label twice, then the blank.
    steps = np.repeat(np.where(said > 0, said, 0), 3, axis=1)
    steps[:, 2::3] = 0
    assert figure("word_error_rate", np.eye(4)[steps], right) == pytest.approx(wanted)


@pytest.mark.parametrize("words", [3, 0])
def test_a_word_error_rate_of_one_sample_is_no_figure(words: int) -> None:
    right = np.full((2, 3), metrics.IGNORED)
    right[0, :words] = 1
    with pytest.raises(BadWorkload, match="fewer than two samples hold right words"):
        figure("word_error_rate", np.ones((2, 3), int), right)


@pytest.mark.parametrize("said", [float, int])
def test_words_are_labels_not_scores(said: type) -> None:
    right = np.array([[1, 2], [3, 4]]) if said is float else np.array([[1, 2], [3, np.nan]])
    with pytest.raises(BadWorkload, match="labels are integers, not float64"):
        figure("word_error_rate", np.ones((2, 2), said), right)


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize(("size", "flips"), [(24, 0.0), (24, 0.05), (100, 0.2)])
def test_the_interval_of_a_word_error_rate_holds_the_truth(size: int, flips: float) -> None:
    rng, held = np.random.default_rng(1), []
    for _ in range(DRAWS):
        right = rng.integers(1, 9, (size, 5))
        right[np.arange(5) >= rng.integers(1, 6, (size, 1))] = metrics.IGNORED
        said = (np.where((rng.random(right.shape) < flips) & (right > 0), 9, right) for _ in range(2))
        first, second = (metrics.word_errors(labels, right) for labels in said)
        low, high = intervals.of_difference(first, second, np.mean, False)(size)
        held.append(low <= 0 <= high and low < high)
    assert np.mean(held) >= 0.93
