"""How like two answers are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.rollout import likeness

ROW = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]], np.float32)
NAN = np.full((1, 2), np.nan)


def compared(old: np.ndarray, new: np.ndarray | None, batched: bool = True) -> likeness.Rows:
    return likeness.compare([({"y": old}, {} if new is None else {"y": new})], batched)


@pytest.mark.parametrize(
    ("old", "new", "alike"),
    [
        (ROW, ROW, [1, 1]),
        (ROW, 3 * ROW, [0.6, 0.6]),
        (ROW, ROW[::-1], [0, 0]),
        (ROW, -ROW, [-1, -1]),
        (np.zeros((2, 2)), np.zeros((2, 2)), [1, 1]),
        (np.zeros((2, 4)), np.ones((2, 4)), [0, 0]),
        (NAN, NAN, [-1]),
        (NAN, np.ones((1, 2)), [-1]),
        (np.ones((1, 4)), np.full((1, 4), np.inf), [-1]),
        (np.full((1, 4), np.inf), np.full((1, 4), np.inf), [1]),
        (np.array([[0.1]]), np.array([[1000.0]]), [0.0001]),
        (np.array([[2.0]]), np.array([[1.9]]), [0.95]),
        (np.array([[100.0], [1e-9], [100.0]]), np.array([[100.0], [-1e-9], [100.0]]), [1, 1, 1]),  # beside the others
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), [1, 1, 1, 0]),
        (np.array([[b"a"], [b"b"]], object), np.array([[b"a"], [b"c"]], object), [1, 0]),
        (ROW, ROW[:1], [0, 0]),
        (ROW, ROW.astype(np.float64), [0, 0]),
        (ROW, None, [0, 0]),
        (ROW[:0], ROW[:0], []),
    ],
)
def test_likeness(old: np.ndarray, new: np.ndarray | None, alike: list[float]) -> None:
    assert compared(old, new).likeness == pytest.approx(alike, abs=1e-4)


@pytest.mark.parametrize(
    ("old", "new", "flipped"),
    [
        ([[10.0, 9.0], [1.0, 2.0]], [[9.0, 10.0], [1.0, 3.0]], [True, False]),
        ([[0.6, 0.8], [1.0, 0.0]], [[0.8, 0.6], [1.0, 0.0]], [False, False]),  # directions
        ([[5.0]], [[6.0]], [False]),
    ],
)
def test_labels(old: list[list[float]], new: list[list[float]], flipped: list[bool]) -> None:
    assert compared(np.array(old), np.array(new)).flipped.tolist() == flipped


def test_without_a_batch_an_answer_is_one_row() -> None:
    found = compared(np.array([9.0, 1.0, 1.0, 1.0]), np.array([1.0, 9.0, 1.0, 1.0]), batched=False)
    assert (len(found.likeness), found.flipped.tolist()) == (1, [True])


def test_the_least_like_output_counts() -> None:
    old = {"y": ROW, "label": np.array([1, 2])}
    found = likeness.compare([(old, {"y": ROW, "label": np.array([1, 3])}), (old, old)], batched=True)
    assert found.likeness.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        (ROW, ROW + 0.5, 0.5),
        (ROW, np.full_like(ROW, np.nan), np.inf),
        (np.full_like(ROW, np.nan), ROW, np.inf),
        (np.full_like(ROW, np.nan), np.full_like(ROW, np.nan), np.inf),
        (np.full_like(ROW, np.inf), np.full_like(ROW, np.inf), 0),
        (ROW, np.full_like(ROW, -np.inf), np.inf),
        (ROW, ROW[:1], np.inf),
        (ROW[:0], ROW[:0], 0),
        (ROW, None, np.inf),
        (np.array([1]), np.array([2]), 0),
    ],
)
def test_difference(old: np.ndarray, new: np.ndarray | None, difference: float) -> None:
    assert compared(old, new).difference == difference


FLOATS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@given(FLOATS)
@settings(deadline=None)
def test_an_answer_is_like_itself_alone(array: np.ndarray) -> None:
    same = compared(array, array.copy())
    assert (same.likeness == 1).all()
    assert not same.flipped.any()
    assert same.difference == 0
    spoiled = array.copy()
    spoiled[0, 0] = np.nan
    assert not (compared(array, spoiled).likeness[0] >= 0)
    assert not (compared(spoiled, spoiled).likeness[0] >= 0)


@given(FLOATS, FLOATS)
@settings(deadline=None)
def test_likeness_is_between_its_ends(old: np.ndarray, new: np.ndarray) -> None:
    found = compared(old, new).likeness
    assert len(found) == len(old)
    assert ((found >= -1) & (found <= 1 + 1e-9)).all()


@given(FLOATS, st.floats(1.5, 1e6))
@settings(deadline=None)
def test_a_scaled_answer_is_another_one(array: np.ndarray, scale: float) -> None:
    lengths = np.linalg.norm(array.astype(np.float64), axis=1)
    found = compared(array.astype(np.float64), array.astype(np.float64) * scale).likeness
    large = lengths >= max(np.median(lengths), 1e-30)
    assert (found[large] < 0.99).all()
