"""Whether an answer is right, and what a wrong one is reported with."""

from typing import Any

import numpy as np
import pytest

from loadtest.plan.data.answers import MOST_SAMPLES, Answers

RIGHT = np.array([[1.0, 2.0], [3.0, np.nan]], np.float32)


def wrong(expected: Any, got: Any, tolerance: float = 1e-3) -> tuple[str, list[dict[str, Any]]]:
    answers = Answers({5: ({"y": expected}, tolerance)})
    text = answers.wrong(77, 5, b"raw", lambda: {"y": got, "other": np.zeros(1)})
    return text, answers.samples


def off(value: float) -> np.ndarray:
    array = RIGHT.copy()
    array[1, 0] += value
    return array


@pytest.mark.parametrize("got", [RIGHT, off(5e-4)])
def test_right_answers(got: np.ndarray) -> None:
    assert wrong(RIGHT, got) == ("", [])


@pytest.mark.parametrize(
    ("expected", "got", "text", "index", "values"),
    [
        (RIGHT, off(0.5), "differs by more than 0.001", [1, 0], (3.0, 3.5)),
        (RIGHT, off(np.nan), "differs", [1, 0], (3.0, "nan")),
        (RIGHT, off(np.inf), "differs", [1, 0], (3.0, "inf")),
        (RIGHT, np.nan_to_num(RIGHT), "differs", [1, 1], ("nan", 0.0)),
        (RIGHT, RIGHT[:1], "is float32[1, 2] instead of float32[2, 2]", None, ("float32[2, 2]", "float32[1, 2]")),
        (RIGHT, RIGHT.astype(np.float64), "is float64", None, ("float32[2, 2]", "float64[2, 2]")),
        (np.array([1, 2, 3]), np.array([1, 2, 4]), "has other values", [2], (3, 4)),
        (np.array([True]), np.array([False]), "has other values", [0], (True, False)),
        (np.array([b"a", b"b"], object), np.array([b"a", b"\xff"], object), "has other values", [1], ("b", "\ufffd")),
    ],
)
def test_wrong_answers_name_the_worst_element(
    expected: np.ndarray, got: np.ndarray, text: str, index: list[int] | None, values: tuple[Any, Any]
) -> None:
    said, samples = wrong(expected, got)
    assert said.startswith(f"output y {text}")
    assert samples == [
        {"n": 77, "payload": 5, "output": "y", "index": index, "expected": values[0], "got": values[1]}
    ]  # fmt: skip


def test_a_missing_output() -> None:
    answers = Answers({0: ({"y": RIGHT, "z": RIGHT}, 0.0)})
    assert answers.wrong(1, 0, b"", lambda: {"y": RIGHT}) == "output z is missing"
    assert answers.samples[0]["got"] == "nothing"


def test_all_are_counted_and_few_are_kept() -> None:
    answers = Answers({0: ({"y": RIGHT}, 0.0)})
    texts = [answers.wrong(n, 0, b"", lambda: {"y": off(1.0)}) for n in range(100)]
    assert all(texts)
    assert answers.checked == 100
    assert [sample["n"] for sample in answers.samples] == list(range(MOST_SAMPLES))
    assert answers.wrong(1, 1, b"", lambda: {}) == ""
    answers.reset()
    assert (answers.checked, answers.samples) == (0, [])


def test_equal_bytes_are_decoded_once() -> None:
    answers, decoded = Answers({0: ({"y": RIGHT}, 0.0)}), []

    def decode() -> dict[str, np.ndarray]:
        decoded.append(1)
        return {"y": RIGHT}

    for _ in range(10):
        assert answers.wrong(0, 0, b"same", decode) == ""
    assert (len(decoded), answers.checked) == (1, 10)
