from fractions import Fraction
from math import ceil

import numpy as np
import pytest

from loadtest.record.statistics import curve, milliseconds, percentile, windows


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)])
def test_percentile_is_an_observed_value(percent: float, expected: float) -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    assert percentile(values, percent) == expected


def test_no_values_have_no_percentile() -> None:
    assert np.isnan(percentile(np.array([]), 50))
    assert all(np.isnan(value) for value in milliseconds(np.array([])).values())


def test_milliseconds() -> None:
    figures = milliseconds(np.array([0.001, 0.002, 0.003, 0.010]))
    assert figures["mean"] == pytest.approx(4)
    assert figures["p50"] == pytest.approx(2)
    assert figures["max"] == pytest.approx(10)


@pytest.mark.parametrize("count", [1, 7, 10_000])
def test_curve_rises_to_a_percentile_that_the_count_supports(count: int) -> None:
    percents, values = curve(np.random.default_rng(0).exponential(size=count))
    assert percents[0] == 0
    assert percents[-1] == pytest.approx(100 * (1 - 1 / max(count, 10)))
    assert (np.diff(values) >= 0).all()


@pytest.mark.parametrize(
    ("end", "most", "expected"),
    [
        (1.0, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.05, 5, [0, 0.5, 1.05]),
        (1.4, 5, [0, 0.5, 1.0, 1.4]),
        (0.3, 0, [0, 0.3]),
    ],
)
def test_windows_have_a_round_width(end: float, most: int, expected: list[float]) -> None:
    assert windows(end, most) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 2000, 3000, 10_000])
def test_a_percentile_is_the_value_of_its_rank(count: int) -> None:
    """The rank is ceil(percent of the count), in exact arithmetic: the 99.9th of 1,000 is not their maximum."""
    values = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    for percent in ("50", "90", "95", "99", "99.9", "100"):
        expected = ceil(Fraction(percent) * count / 100)
        assert percentile(values, float(percent)) == expected
    figures = milliseconds(values / 1e3)
    assert figures["p999"] == pytest.approx(ceil(Fraction("99.9") * count / 100))
    assert figures["max"] == pytest.approx(count)
