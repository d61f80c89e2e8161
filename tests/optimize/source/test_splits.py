"""Sets of a workload: nothing is judged on what it was made from, and searches choose on samples of their own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from modelathe.tensors import BATCH, Array, Dim, TensorSpec
from optimize.methods import apply as step
from optimize.methods.quantize.half import Half
from optimize.methods.quantize.mixed import Mixed
from optimize.model.errors import BadData, BadWorkload
from optimize.source import splits
from optimize.source.batch import Batch
from optimize.source.texts import Texts
from optimize.source.workload import Workload
from optimize.step import bundle
from tests.optimize.conftest import Optimize
from tests.optimize.runs.test_kills import USER
from tests.optimize.small import IMAGES, LABELS, TEST, TRAIN, batches

LEAKS = {
    "calibration": (
        "calibration=lambda: batches(slice(0, 256))",
        "calibration=lambda: batches(slice(1300, 1500))",
        100,
    ),
    "training": ("training=lambda: batches(TRAIN)", "training=lambda: batches(slice(1000, 1403))", 3),
}


UNTRAINED = ("    small.load_state_dict(weights())\n", "")


@pytest.mark.parametrize("kind", LEAKS)
def test_an_overlap_is_refused_with_its_count(kind: str, optimize: Optimize, user_file: Callable[..., str]) -> None:
    old, new, count = LEAKS[kind]
    source = user_file(UNTRAINED, (old, new))
    output = Path(source).parent
    (output / "recipe.toml").write_text("[target]\nbatch = [1]\n[[step]]\nuse = 'quantize.dynamic'\n")
    for arguments in (
        ("quantize", source, "--output", output / "made"),
        ("run", source, "--recipe", output / "recipe.toml", "--output", output / "run"),
        ("sensitivity", source, "--output", output / "page.html"),
    ):
        ended = optimize(*arguments)
        assert ended.code == 4
        assert f"of 397 different evaluation samples {count} also stand in {kind}" in ended.err
        assert "--allow-overlap" in ended.err
    assert not [name for name in ("made", "run", "page.html") if (output / name).exists()]


@pytest.mark.usefixtures("each_step_faster")
def test_an_overlap_that_is_allowed_stands_in_lineage_and_page(optimize: Optimize, tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER.replace("X[32:]", "X[16:80]"))
    (tmp_path / "recipe.toml").write_text(
        'budget = {max_drop = 1.0}\ntarget = {batch = [1], cores = 1}\nstep = [{use = "export.onnx"}]\n'
    )
    output = tmp_path / "run"
    arguments = ("run", f"{tmp_path}/user.py:workload", "--recipe", tmp_path / "recipe.toml", "--output", output)
    ended = optimize(*arguments, "--allow-overlap", "--json", "--force")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["overlap"] == {"training": 16}
    assert bundle.describe(output / "1-export.onnx")["lineage"][-1]["overlap"] == {"training": 16}
    assert "16 evaluation samples also stand in the training set" in (output / "report.html").read_text()


def test_the_order_and_the_batches_of_a_set_do_not_matter(small: Workload) -> None:
    def shuffled() -> Iterator[Batch]:
        order = np.random.default_rng().permutation(1400)
        for part in np.array_split(order, 9):
            yield Batch({"image": IMAGES[TRAIN][part]}, LABELS[TRAIN][part])

    before = splits.read(small)
    assert splits.read(replace(small, training=shuffled)) == before
    flipped = replace(small, training=lambda: (Batch(x.inputs, 9 - x.targets) for x in batches(TRAIN)))
    assert splits.read(flipped).digests["training"] != before.digests["training"]
    fewer = replace(small, evaluation=lambda: list(batches(TEST))[1:])
    assert splits.read(fewer).digests["evaluation"] != before.digests["evaluation"]


@pytest.mark.parametrize("kind", ["global", "own"])
def test_evaluation_that_changes_from_call_to_call_is_refused(kind: str, small: Workload) -> None:
    data = TensorDataset(torch.from_numpy(IMAGES[TEST]), torch.from_numpy(LABELS[TEST]))

    def by_loader() -> Iterator[Batch]:
        for image, label in DataLoader(data, 64, shuffle=True):
            yield Batch({"image": image.numpy()}, label.numpy())

    def by_numpy() -> Iterator[Batch]:
        order = np.random.default_rng().permutation(397)
        yield Batch({"image": IMAGES[TEST][order]}, LABELS[TEST][order])

    with pytest.raises(BadData, match="another order, at the second call"):
        splits.read(replace(small, evaluation=by_loader if kind == "global" else by_numpy))


def test_sets_that_can_be_read_only_once_are_named(small: Workload) -> None:
    once = batches(TEST)
    with pytest.raises(BadData, match=r"evaluation\(\) returned no batch"):
        splits.read(replace(small, evaluation=lambda: once))


TOKENS = Dim("tokens", 2, 4, 16)
TEXT = (
    TensorSpec("ids", "int64", (BATCH, TOKENS)),
    TensorSpec("mask", "int64", (BATCH, TOKENS)),
    TensorSpec("size", "float32", (BATCH, 1)),
)


def texts(rows: list[list[int]], length: int, pad: int = 1) -> Batch:
    ids = np.array([row + [pad] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch({"ids": ids, "mask": mask, "size": np.array([[len(row)] for row in rows], np.float32)})


def test_padding_does_not_hide_a_sample() -> None:
    short, long = (splits.digests(texts([[5, 6, 7], [5, 6]], length), TEXT) for length in (3, 9))
    assert short == long
    assert len({*short}) == 2
    without = TEXT[:1]
    rows = [Batch({"ids": np.array([[5, 6, *[0] * zeros]])}) for zeros in (0, 1, 5)]
    assert len({splits.digests(row, without)[0] for row in rows}) == 1


def test_samples_that_say_nothing_do_not_overlap(small: Workload) -> None:
    def with_blank(part: slice) -> Iterator[Batch]:
        yield Batch({"image": np.zeros((2, 1, 8, 8), np.float32)}, np.zeros(2, int))
        yield from batches(part)

    blank = replace(small, evaluation=lambda: with_blank(TEST), training=lambda: with_blank(TRAIN))
    assert splits.read(blank).overlap == {}
    with pytest.raises(BadData, match="of 1 different evaluation samples 1 also stand in training"):
        number = replace(small, inputs=(TensorSpec("x", "float32", (BATCH, 1)),))
        one = Batch({"x": np.ones((1, 1), np.float32)}, np.ones(1))
        splits.read(replace(number, evaluation=lambda: [one], calibration=None, training=lambda: [one]))


def test_a_blank_image_that_changes_its_color_is_another_one(small: Workload) -> None:
    def evaluation(color: float, *others: float) -> list[Batch]:
        colors = np.array([color, *others], np.float32).reshape(-1, 1, 1, 1)
        return [Batch({"image": colors + np.zeros((1, 8, 8), np.float32)}, np.zeros(len(colors), int))]

    found = [
        splits.read(replace(small, evaluation=lambda color=color: evaluation(color))).digests["evaluation"]
        for color in (0.0, 1.0)
    ]
    assert found[0] != found[1]
    orders = iter([(0.0, 1.0), (1.0, 0.0)])
    with pytest.raises(BadData, match="another order, at the second call"):
        splits.read(replace(small, evaluation=lambda: evaluation(*next(orders))))
    plain = replace(small, calibration=None, training=lambda: evaluation(*np.linspace(0, 1, 150)))
    assert len(images(splits.selecting(plain))) == 150


def images(workload: Workload) -> set[bytes]:
    return {row.tobytes() for batch in workload.evaluation() for row in batch.inputs["image"]}


def test_a_search_is_judged_on_training_samples_that_do_not_calibrate(small: Workload) -> None:
    chosen = splits.selecting(small)
    taken = images(chosen)
    assert len(taken) == 397
    assert taken <= {row.tobytes() for row in IMAGES[256:1400]}
    assert taken == images(splits.selecting(small)), "the same ones every time"
    labels = {image.tobytes(): label for image, label in zip(IMAGES, LABELS, strict=True)}
    for batch in chosen.evaluation():
        assert [labels[image.tobytes()] for image in batch.inputs["image"]] == batch.targets.tolist()
    assert len(images(splits.selecting(small, 33))) == 33


def test_a_search_has_enough_samples_though_most_of_them_calibrate(small: Workload) -> None:
    most = replace(small, training=lambda: batches(slice(0, 1000)), calibration=lambda: batches(slice(0, 999)))
    assert splits.size(splits.selecting(most), "evaluation") == 397
    assert splits.size(splits.selecting(most, 50), "evaluation") == 50
    few = replace(most, calibration=lambda: batches(slice(0, 900)))
    assert images(splits.selecting(few)) == {row.tobytes() for row in IMAGES[900:1000]}


@pytest.mark.parametrize(("present", "asked", "needed"), [(1, 0, 100), (99, 0, 100), (99, 5000, 100), (20, 33, 33)])
def test_a_search_on_too_few_samples_is_refused(present: int, asked: int, needed: int, small: Workload) -> None:
    few = replace(small, calibration=None, training=lambda: [*batches(slice(0, present))] * 200)
    said = f"training has {present} different samples to choose on, at least {needed} are needed"
    with pytest.raises(BadWorkload, match=said):
        splits.selecting(few, asked)
    with pytest.raises(BadWorkload, match=said):
        step.check_needs(Mixed(ranges="dynamic", judge_samples=asked), few)
    # No more than the evaluation set has: where that is so small, so is everything that is found out.
    splits.selecting(replace(few, evaluation=lambda: batches(slice(1400, 1400 + present))))


def test_where_a_search_takes_its_samples_from(small: Workload) -> None:
    unlabelled = replace(small, training=lambda: (Batch(batch.inputs) for batch in batches(TRAIN)))
    assert splits.source(small) == "training"
    assert splits.source(replace(small, selection=lambda: batches(slice(0, 100)))) == "selection"
    assert splits.source(unlabelled) == "calibration"
    assert images(splits.selecting(unlabelled)) == {row.tobytes() for row in IMAGES[:256]}
    with pytest.raises(BadWorkload, match="no samples to choose on"):
        step.check_needs(Mixed(ranges="dynamic"), replace(small, training=None, calibration=None))


def test_16_bit_arithmetic_looks_for_large_values_in_calibration_only(small: Workload) -> None:
    with pytest.raises(BadWorkload, match="needs the workload's calibration"):
        step.check_needs(Half(compute=True), replace(small, calibration=None))
    step.check_needs(Half(), replace(small, calibration=None))


def test_samples_of_several_lengths_are_judged_together_with_their_like() -> None:
    rows = [[number] * (2 + number % 3) for number in range(1, 40)]

    def training() -> Iterator[Batch]:
        for row in rows:
            yield replace(texts([row], len(row)), targets={"label": np.array([row[0]])})

    def scores(outputs: object, targets: object, reference: object) -> dict[str, Array]:
        return {}

    judged = replace(texts([[90, 91]], 2), targets={"label": np.array([3])})
    workload = Workload("texts", lambda: torch.nn.Identity(), TEXT, ("y",), lambda: [judged], scores, training=training)
    chosen = list(splits.selecting(workload, 20).evaluation())
    assert sum(len(batch.inputs["ids"]) for batch in chosen) == 20
    for batch in chosen:
        assert (batch.inputs["ids"][:, 0] == batch.targets["label"]).all()


def test_texts_that_are_one_to_the_model_are_in_one_part() -> None:
    given = Texts(tuple("abcdefgh"), tuple(range(8)))
    assert given.distinct([[number // 2] for number in range(8)]) == Texts(("a", "c", "e", "g"), (0, 2, 4, 6))
