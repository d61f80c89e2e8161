import pytest

from loadtest.load.loop import Progress
from loadtest.plan.plan import Plan
from loadtest.report.live import SPAN, Latest, line, shown

PLAN = Plan("http://h:1", 60.0, rate=100.0)


def test_the_figures_are_those_of_the_last_seconds() -> None:
    latest = Latest()
    for tick in range(1, 201):
        slow = 0.5 if tick < 100 else 0.002
        latest.add(Progress(tick / 10, tick * 10, 3, 7, recent=((slow, 0.001),) * 5))
    figures = latest.figures()
    assert figures["done"] == "2,000"
    assert figures["per second"] in ("100", "100.0")
    assert figures["p99"] == "2.00 ms"
    assert figures["lag p99"] == "1.00 ms"
    assert figures["in flight"] == "7"
    assert len(latest._states) <= SPAN * 10 + 2


def test_nothing_yet_is_shown_as_nothing() -> None:
    latest = Latest()
    latest.add(Progress(0.1))
    assert latest.figures()["p50"] == "- ms"


def test_the_warm_up_is_forgotten() -> None:
    latest = Latest()
    latest.add(Progress(1.0, 500, warming=True, recent=((9.0, 9.0),)))
    latest.add(Progress(0.1, 10, recent=((0.001, 0.0),)))
    assert latest.figures()["p99"] == "1.00 ms"


def test_lines_elsewhere_and_nothing_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with shown(PLAN, quiet) as show:
            show(Progress(0.9, warming=True))
            for tick in range(1, 121):
                show(Progress(tick / 10, tick, recent=((0.001, 0.0),)))
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == (0 if quiet else 2)
    assert line(PLAN, Progress(0.4, warming=True), Latest()) == "warm-up, 0 of 1 s"
