"""How late answers are taken in is told by a loop whose clock the test sets."""

from collections.abc import Callable
from typing import Any

import pytest

from loadtest.load.eventloop import Heartbeat


class Clock:
    """An event loop's clock and its one timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timer: tuple[float, Callable[[], None]] = (0.0, lambda: None)
        self.beats = 0

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, beat: Callable[[], None]) -> Any:
        self.timer = due, beat

    def sleep(self, seconds: float) -> None:
        """Let time pass in which the loop does nothing else than what is due."""
        end = self.now + seconds
        while self.timer[0] <= end:
            self.now, self.beats = self.timer[0], self.beats + 1
            self.timer[1]()
        self.now = end

    def stand_still(self, seconds: float) -> None:
        """Let time pass in which the loop does not run."""
        self.now += seconds


@pytest.mark.parametrize(("latency", "beat"), [(0.005, 0.001), (0.25, 0.005), (10.0, 0.02)])
def test_an_answer_that_waited_for_the_loop_is_late(latency: float, beat: float) -> None:
    clock = Clock()
    heart = Heartbeat(clock)  # type: ignore[arg-type]
    counted = []
    for _ in range(980):
        clock.sleep(0.03)
        heart.note(latency)
        counted.append(clock.beats)
    for _ in range(20):
        clock.sleep(0.03)
        clock.stand_still(0.05)
        heart.note(latency)
    found = heart.milliseconds()
    for key in ("p99", "p999", "max"):
        assert found[key] == pytest.approx(50, abs=50 * 0.05 + 1e3 * beat)
    assert counted[-1] - counted[480] < 1.2 * 500 * 0.03 / beat


def test_slow_requests_do_not_hide_what_quick_ones_beside_them_wait_for() -> None:
    clock = Clock()
    heart = Heartbeat(clock)  # type: ignore[arg-type]
    for number in range(2000):
        clock.sleep(0.03)
        quick = number % 20 == 0
        if quick:
            clock.stand_still(0.004)
        heart.note(0.01 if quick else 2.0)
    assert (heart.milliseconds()["p99"] or 0.0) > 1


def test_answers_between_two_beats_are_not_late_and_none_says_nothing() -> None:
    clock = Clock()
    heart = Heartbeat(clock)  # type: ignore[arg-type]
    assert heart.milliseconds() == {"p99": None, "p999": None, "max": None}
    clock.stand_still(5.0)  # nobody waited for the loop meanwhile
    clock.sleep(0.01)
    heart.note(0.005)
    assert (heart.milliseconds()["max"] or 0.0) < 0.01
