"""Intervals hold the truth as often as they say, also where nothing was seen to differ."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from modelathe.tensors import Array
from optimize.judge import gate, intervals
from optimize.judge.budget import Budget
from optimize.judge.evaluate import Difference, Score
from optimize.source.batch import mean

SIZES = (24, 100, 500)
TRUE = 0.93


Found = dict[tuple[int, int], tuple[float, float]]


def coverage(size: int, more: float, less: float, found: Found) -> float:
    """Return the share of draws whose interval holds the truth, summed over all outcomes: no simulation is as exact."""
    counts, held = np.arange(size + 1), 0.0
    for wins, chance in enumerate(binom.pmf(counts, size, more)):
        likely = chance * binom.pmf(counts[: size - wins + 1], size - wins, less / (1 - more)) if chance > 1e-6 else []
        for losses in np.flatnonzero(np.greater(likely, 1e-6)).tolist():
            if (wins, losses) not in found:
                found[wins, losses] = intervals.paired_proportions(wins, losses, size)
            low, high = found[wins, losses]
            held += likely[losses] * (low <= more - less <= high)
    return held


@pytest.mark.parametrize("size", SIZES)
def test_pairs_of_right_and_wrong(size: int) -> None:
    found: Found = {}
    held = [
        coverage(size, flips * share / size, flips * (1 - share) / size, found)
        for flips in (0.1, 1, 3, 8)
        for share in (0.0, 0.5, 0.75, 1.0)
    ]
    assert min(held) >= TRUE
    assert intervals.paired_proportions(0, 0, size) == pytest.approx((-4 / (size + 4), 4 / (size + 4)), rel=1e-6)


@pytest.mark.slow
def test_pairs_of_right_and_wrong_over_all_rates(capsys: pytest.CaptureFixture[str]) -> None:
    for size in SIZES:
        found: Found = {}
        held = [
            coverage(size, flips * share, flips * (1 - share), found)
            for flips in np.linspace(0.2, 12, 30) / size
            for share in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
        ]
        with capsys.disabled():
            print(f"\n{size} pairs: coverage {np.mean(held):.3f} on average, {min(held):.3f} at worst")
        assert min(held) >= TRUE
        assert np.mean(held) >= 0.95


def normal(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    scores = rng.normal(2, 1.5, size)
    return scores, scores - rng.normal(0.02, 0.1, size), 0.02


def skewed(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    scores = rng.normal(2, 1.5, size)
    return scores, scores - rng.lognormal(0, 0.75, size), math.exp(0.75**2 / 2)


def few_lose_much(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    scores = rng.normal(2, 1.5, size)
    return scores, scores - np.where(rng.random(size) < 0.02, rng.normal(1, 0.3, size), 0), 0.02


def shifted(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    scores = rng.normal(2, 1.5, size)
    return scores, scores - 0.5 - rng.normal(0, 0.001, size), 0.5


def masks_lost(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    """Overlaps in [0, 1], all a little off, one in fifty lost."""
    scores = rng.beta(8, 2, size)
    noisy = np.clip(scores + rng.normal(0, 0.002, size), 0, 1)
    return scores, np.where(rng.random(size) < 0.02, 0, noisy), 0.016


def tenths(rng: np.random.Generator, size: int) -> tuple[Array, Array, float]:
    scores = rng.integers(3, 8, size) / 10
    return scores, np.where(rng.random(size) < 0.02, scores + rng.choice([-0.3, 0.3], size), scores), 0.0


def at_once(rows: Array, _statistic: object, seed: int = 0) -> Array:
    """Resample the difference of two means as `intervals.bootstrap` does, all in one array, which is faster."""
    rng = np.random.default_rng(seed)
    first, second = rows[:, rng.integers(0, rows.shape[-1], (200, rows.shape[-1]))].mean(-1)
    return np.asarray(first - second)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("draw", "bounded"),
    [(normal, 0), (skewed, 0), (few_lose_much, 0), (shifted, 0), (masks_lost, 1), (tenths, 1)],
)
def test_pairs_of_other_scores(
    draw: Callable[[np.random.Generator, int], tuple[Array, Array, float]],
    bounded: bool,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "bootstrap", at_once)
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        first, second, truth = draw(rng, size)
        low, high = intervals.of_difference(first, second, mean, bool(bounded))(size)
        assert low < high
        held += low <= truth <= high
    assert held / 200 >= TRUE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rate", [0.8, 0.98, 1.0])
def test_one_share(size: int, rate: float) -> None:
    held = 0.0
    for right in range(size + 1):
        samples = np.arange(size) < right
        low, high = intervals.of_score(samples.astype(float), mean, True)
        assert 0 <= low < high <= 1
        held += binom.pmf(right, size, rate) * (low <= rate <= high)
    assert held >= TRUE


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.25])
@pytest.mark.parametrize(
    ("aggregate", "bounded"),
    [(mean, True), (mean, False), (lambda samples: float(np.exp(samples.mean())), False)],
)
def test_samples_that_are_all_alike_do_not_make_it_certain(
    value: float, aggregate: Callable[[Array], float], bounded: bool
) -> None:
    widths = []
    for size in SIZES:
        alike = np.full(size, value)
        low, high = intervals.of_difference(alike, alike, aggregate, bounded)(size)
        assert low < 0 < high
        widths.append(high - low)
        low, high = intervals.of_score(alike, aggregate, bounded and 0 <= value <= 1)
        assert low < high
    assert widths[0] > 2 * widths[1] > 8 * widths[2]


def strict(size: int, losses: int, limit: float) -> gate.Gate:
    at = intervals.of_difference(np.arange(size) >= losses, np.ones(size), mean, True)
    trained, result = (Score("accuracy", np.ones(size), value, 0, 1, True, True) for value in (1.0, 1 - losses / size))
    difference = Difference(-losses / size, *at(size), (), (), True, at)
    return gate.quality(Budget(max_drop=limit), trained, result, difference, strict=True)


@pytest.mark.parametrize(
    ("size", "drop", "limit"), [(24, 0.02, 0.005), (100, 0.01, 0.005), (397, 0.01, 0.005), (2000, 0.01, 0.005)]
)
def test_strict_passes_no_drop_that_is_too_large(size: int, drop: float, limit: float) -> None:
    passed = sum(binom.pmf(losses, size, drop) * strict(size, losses, limit).passed for losses in range(60))
    assert passed <= 0.05


def test_strict_can_pass() -> None:
    assert strict(800, 0, 0.005).passed
    assert strict(4000, 10, 0.005).passed


@pytest.mark.parametrize(("size", "losses", "limit"), [(24, 0, 0.005), (100, 0, 0.01), (100, 2, 0.03), (500, 9, 0.01)])
def test_the_samples_that_decide_do(size: int, losses: int, limit: float) -> None:
    advice = strict(size, losses, limit).advice
    decide = int(advice.partition("about ")[2].partition(" samples")[0].replace(",", ""))
    assert decide > size

    def holds_the_limit(samples: int) -> bool:
        low, high = intervals.paired_proportions(losses * samples / size, 0, samples)
        return low <= limit < high

    assert not holds_the_limit(decide)
    assert holds_the_limit(decide - 1)


def test_other_scores_name_the_samples_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    trained, lost = rng.beta(8, 2, 200), 0.02 * rng.random(200)
    at = intervals.of_difference(trained - lost, trained, mean, True)
    low, high = at(200)
    assert at(800)[1] - at(800)[0] == pytest.approx((high - low) / 4, rel=0.1), "what was not seen weighs most"
    larger = np.tile(trained, 10), np.tile(lost, 10)
    wanted = intervals.of_difference(larger[0] - larger[1], larger[0], mean, True)(2000)
    assert at(2000) == pytest.approx(wanted, abs=2e-4)


def test_the_figure_may_be_any_aggregate() -> None:
    def f1(codes: Array) -> float:
        hits, false, missed = ((codes == code).sum() for code in (1, 2, 3))
        return float(2 * hits / max(2 * hits + false + missed, 1))

    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        codes = rng.choice([0, 1, 2, 3], 100, p=[0.4, 0.5, 0.04, 0.06])
        low, high = intervals.of_score(codes.astype(float), f1, True)
        assert 0 <= low <= f1(codes) <= high <= 1
        held += low <= 1 / 1.1 <= high
    assert held >= 56
