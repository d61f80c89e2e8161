"""How late answers are taken in is told by a loop whose clock the test sets."""

from collections.abc import Callable
from typing import Any

import pytest

from loadtest.eventloop import Heartbeat


class Clock:
    """An event loop's clock and its one timer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timer: tuple[float, Callable[[], None]] = (0.0, lambda: None)

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, beat: Callable[[], None]) -> Any:
        self.timer = due, beat

    def sleep(self, seconds: float) -> None:
        """Let time pass in which the loop does nothing else than what is due."""
        end = self.now + seconds
        while self.timer[0] <= end:
            self.now = self.timer[0]
            self.timer[1]()
        self.now = end

    def stand_still(self, seconds: float) -> None:
        """Let time pass in which the loop does not run."""
        self.now += seconds


def test_an_answer_that_waited_for_the_loop_is_late() -> None:
    clock = Clock()
    heart = Heartbeat(clock)  # type: ignore[arg-type]
    for _ in range(980):
        clock.sleep(0.01)
        heart.note()
    for _ in range(20):
        clock.sleep(0.01)
        clock.stand_still(0.05)
        heart.note()
    found = heart.milliseconds()
    for key in ("p99", "p999", "max"):
        assert found[key] == pytest.approx(50, abs=50 * 0.05 + 1e3 * Heartbeat.EVERY)


def test_answers_between_two_beats_are_not_late_and_none_says_nothing() -> None:
    clock = Clock()
    heart = Heartbeat(clock)  # type: ignore[arg-type]
    assert heart.milliseconds() == {"p99": None, "p999": None, "max": None}
    clock.stand_still(5.0)  # nobody waited for the loop meanwhile
    clock.sleep(0.01)
    heart.note()
    assert (heart.milliseconds()["max"] or 0.0) < 0.01
