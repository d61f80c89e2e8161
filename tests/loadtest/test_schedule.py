from itertools import pairwise

import numpy as np
import pytest

from loadtest.schedule import SHAPES, constant, poisson


@pytest.mark.parametrize(
    ("rate", "duration", "expected"),
    [
        (2, 2, [0, 0.5, 1, 1.5]),
        (1, 0.5, [0]),
        (0.5, 3, [0, 2]),
        (3, 1, [0, 1 / 3, 2 / 3]),
    ],
)
def test_constant_is_a_table(rate: float, duration: float, expected: list[float]) -> None:
    assert list(constant(rate, duration)) == expected


def test_constant_does_not_drift() -> None:
    times = list(constant(997, 3600))
    assert len(times) == 997 * 3600
    assert times[997 * 3599] == 3599


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_ascends_below_its_duration_at_its_rate(shape) -> None:
    times = list(shape(500, 20, 3))
    assert all(before <= after for before, after in pairwise(times))
    assert times[0] >= 0
    assert times[-1] < 20
    # Five standard deviations of a Poisson count.
    assert abs(len(times) - 10_000) <= 500
    assert times == list(shape(500, 20, 3))


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(list(poisson(1000, 50, 1)))
    assert gaps.mean() == pytest.approx(0.001, rel=0.03)
    # An exponential distribution's deviation equals its mean; equally spaced arrivals have none.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert (gaps > 0.003).mean() == pytest.approx(np.exp(-3), rel=0.1)


def test_poisson_depends_on_the_seed() -> None:
    assert list(poisson(100, 1, 1)) != list(poisson(100, 1, 2))
