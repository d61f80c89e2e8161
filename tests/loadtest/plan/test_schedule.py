from itertools import islice, pairwise

import numpy as np
import pytest

from loadtest.plan import schedule
from loadtest.plan.schedule import ARRIVALS, PROFILES, mean_rate, times
from modelathe.errors import UsageError

WITH_SETTINGS = {"ramp": "ramp:to=500", "step": "step:to=500", "spike": "spike:to=500"}


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
    assert list(times(rate, duration)) == expected


def test_constant_does_not_drift() -> None:
    due = list(times(997, 3600))
    assert len(due) == 997 * 3600
    assert due[997 * 3599] == 3599


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arrival", ARRIVALS)
def test_every_shape_ascends_below_its_duration_at_its_rate(arrival: str, profile: str) -> None:
    profile = WITH_SETTINGS.get(profile, profile)
    due = list(times(500, 20, 3, arrival, profile))
    assert all(before <= after for before, after in pairwise(due))
    assert due[0] >= 0
    assert due[-1] < 20
    # Five standard deviations of the count; gamma's gaps deviate by twice their mean.
    assert abs(len(due) - 10_000) <= (1000 if arrival == "gamma" else 500)
    assert due == list(times(500, 20, 3, arrival, profile))
    assert mean_rate(500, 20, profile) == pytest.approx(500, rel=1e-3)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(list(times(1000, 50, 1, "poisson")))
    assert gaps.mean() == pytest.approx(0.001, rel=0.03)
    # An exponential distribution's deviation equals its mean; equally spaced arrivals have none.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert (gaps > 0.003).mean() == pytest.approx(np.exp(-3), rel=0.1)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_deviate_by_their_burstiness(burstiness: float) -> None:
    gaps = np.diff(list(times(1000, 50, 1, f"gamma:burstiness={burstiness}")))
    assert gaps.mean() == pytest.approx(0.001, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


@pytest.mark.parametrize("arrival", ["poisson", "gamma"])
def test_chance_depends_on_the_seed(arrival: str) -> None:
    assert list(times(100, 1, 1, arrival)) != list(times(100, 1, 2, arrival))


@pytest.mark.parametrize(
    ("profile", "counts"),
    [
        # Requests due in each tenth of ten seconds that begin with 100 a second.
        ("ramp:to=200", [105, 115, 125, 135, 145, 155, 165, 175, 185, 195]),
        ("ramp:to=0", [95, 85, 75, 65, 55, 45, 35, 25, 15, 5]),
        ("step:to=300,steps=5", [100, 100, 150, 150, 200, 200, 250, 250, 300, 300]),
        ("spike:to=400", [100, 100, 100, 100, 400, 400, 100, 100, 100, 100]),
        ("spike:to=0,start=0.1,length=0.3", [100, 0, 0, 0, 100, 100, 100, 100, 100, 100]),
        ("sine:swing=0.5,period=2", [132, 68] * 5),
        ("sine:period=10,swing=0", [100] * 10),
    ],
)
def test_a_profile_is_a_table(profile: str, counts: list[int]) -> None:
    due = list(times(100, 10, profile=profile))
    np.testing.assert_allclose(np.histogram(due, 10, (0, 10))[0], counts, atol=1)
    assert mean_rate(100, 10, profile) == pytest.approx(sum(counts) / 10, rel=0.01)


def test_a_profile_and_chance_go_together() -> None:
    due = np.histogram(list(times(500, 100, 3, "poisson", "ramp:to=1500")), 10, (0, 100))[0]
    expected = 500 * 10 + 1000 * (np.arange(10) + 0.5)
    assert (np.abs(due - expected) < 5 * np.sqrt(expected)).all()
    assert due.std() > 0


@pytest.mark.parametrize(
    ("arrival", "profile", "said"),
    [
        ("bursty", "flat", "no arrival is called 'bursty'"),
        ("gamma:burstiness=0", "flat", "burstiness of the arrival gamma is '0'"),
        ("gamma:burst=1", "flat", "no setting 'burst'"),
        ("poisson:burstiness=1", "flat", "no setting"),
        ("constant", "cliff", "no profile is called 'cliff'"),
        ("constant", "ramp", "needs to"),
        ("constant", "ramp:to=fast", "is 'fast'"),
        ("constant", "ramp:to=-5", "is '-5'"),
        ("constant", "ramp:to=1e9", "goes from"),
        ("constant", "sine:swing=2", "goes from"),
    ],
)
def test_a_shape_that_makes_no_sense(arrival: str, profile: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(islice(times(100, 1, 0, arrival, profile), 10))


def test_all_names_stand_for_functions_here() -> None:
    for name, shape in {**ARRIVALS, **PROFILES}.items():
        assert getattr(schedule, name) is shape
