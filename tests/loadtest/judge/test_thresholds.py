from typing import Any

import pytest

from loadtest.judge.thresholds import METRICS, judge, line, parse
from modelathe.errors import UsageError

TIMES = {"mean": 5.0, "p50": 4.0, "p90": 8.0, "p95": 9.0, "p99": 15.0, "p999": 40.0, "max": 50.0}


def document(**changes: Any) -> dict[str, Any]:
    counts = {"planned": 10_000, "sent": 9900, "done": 9800, "failed": 50, "timed_out": 20, "dropped": 100}
    return {
        "valid": True,
        "requests": counts | {"mismatched": 0},
        "rate": {"offered": 100.0, "achieved": 98.0, "samples": 196.0},
        "plan": {"duration": 10.0},
        "judged_ms": {"latency_ms": TIMES, "service_ms": {name: value / 2 for name, value in TIMES.items()}},
        "lag_ms": {"p99": 0.5, "p999": 0.7, "max": 0.9},
    } | changes


@pytest.mark.parametrize(
    ("sentence", "passed", "measured"),
    [
        ("p99 < 20ms", True, 15),
        ("latency p99 < 20 ms", True, 15),
        ("P99 < 0.01s", False, 0.015),
        ("p99.9 <= 40ms", True, 40),
        ("p999 <= 40000us", True, 40000),
        ("service p50<3ms", True, 2),
        ("mean > 5ms", False, 5),
        ("lag p99 < 1ms", True, 0.5),
        ("errors < 0.1%", False, 0.5),
        ("errors < 1%", True, 0.5),
        ("errors == 50", True, 50),
        ("timeouts != 20", False, 20),
        ("dropped == 0", False, 100),
        ("mismatches == 0", True, 0),
        ("rate >= 98", True, 98),
        ("rate >= 1e2/s", False, 98),
        ("samples > 190 /s", True, 196),
        ("requests >= 98%", True, 98),
    ],
)
def test_a_sentence_is_judged(sentence: str, passed: bool, measured: float) -> None:
    [verdict] = judge(document(), [sentence])
    assert verdict["text"] == sentence
    assert verdict["passed"] is passed
    assert verdict["measured"] == pytest.approx(measured)
    assert line(verdict).startswith("passed" if passed else "FAILED")


def test_several_sentences_stand_in_one_text_and_in_several() -> None:
    verdicts = judge(document(), ["p99 < 20ms, errors < 0.1%", "dropped == 0"])
    assert [verdict["text"] for verdict in verdicts] == ["p99 < 20ms", "errors < 0.1%", "dropped == 0"]


def test_an_invalid_run_and_a_missing_figure_pass_nothing() -> None:
    [verdict] = judge(document(valid=False), ["p99 < 20ms"])
    assert not verdict["passed"]
    assert verdict["measured"] == 15
    for missing in (float("nan"), None):
        for sentence in ("p99 < 20ms", "p99 != 20ms", "p99 > 20ms"):
            assert not judge(document(judged_ms={"latency_ms": {"p99": missing}}), [sentence])[0]["passed"]


def test_every_metric_is_in_the_grammar_and_in_a_document() -> None:
    for name, metric in METRICS.items():
        unit = "ms" if metric.kind == "time" else ""
        [threshold] = parse([f"{name} >= 0{unit}"])
        assert threshold.measured(document()) >= 0


@pytest.mark.parametrize(
    ("sentence", "place", "allowed"),
    [
        ("", "at its end", "a metric"),
        ("p99 < 20ms,", "at its end", "a metric"),
        ("p98 < 20ms", "at 'p98', character 1", "p99.9"),
        ("servce p50 < 20ms", "character 1", "service"),
        ("p99", "at its end", "a comparison: <"),
        ("p99 =< 20ms", "at '=<', character 5", "a comparison"),
        ("p99 = 20ms", "at '=', character 5", "=="),
        ("p99 < fast", "at 'fast', character 7", "a number"),
        ("p99 < -1ms", "at '-1ms', character 7", "a number"),
        ("p99 < 20", "at its end", "us or µs or ms or s"),
        ("p99 < 20%", "at '%', character 9", "ms"),
        ("errors < 1ms", "character 11", "none or %"),
        ("rate > 5 qps", "at 'qps'", "/s"),
        ("p99 < 20ms 30", "at '30', character 12", "a comma"),
    ],
)
def test_a_wrong_sentence_says_where_and_what_is_allowed(sentence: str, place: str, allowed: str) -> None:
    with pytest.raises(UsageError) as error:
        parse([sentence])
    assert place in error.value.what
    assert allowed in error.value.fix
