"""What is said of the dynamic batcher's settings: each finding, its way out, and that the scheduler does as it says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from serve.config import model_config
from serve.repository import lint
from serve.simulate.arrivals import Arrivals, scheduled
from serve.simulate.configuration import stated
from serve.simulate.result import EXPIRED, Simulated
from serve.simulate.service import Curve
from serve.simulate.simulation import simulate
from tests.serve.repository.test_contradictions import HEAD, X, Y, rows

QUEUE = "max_queue_delay_microseconds: 2000"
TWO = f"{X} {Y} instance_group {{ count: 2 kind: KIND_CPU }}"
FREE = f"{X.replace('dims: 4', 'dims: -1')} {Y.replace('dims: 4', 'dims: -1')}"
TIMEOUT = "default_queue_policy { default_timeout_microseconds: 9000 %s }"
THREADS = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }'

CASES: dict[str, tuple[str, str, str, str, str, str]] = {
    "a delay": ("warning", "", f"{X} {Y}", QUEUE, "with fixed dims a queue delay adds up to", ""),
    "a policy and a delay": (
        *("error", "", TWO, f"{QUEUE} {TIMEOUT % ''}"),
        *("a queue policy and a queue delay with several instances: Triton 24.10 answers ever slower", ""),
    ),
    "a policy": ("warning", "", f"{X} {Y}", TIMEOUT % "", "with a queue policy no batch is formed ahead", ""),
    "priorities": (
        *("warning", "", f"{X} {Y}", "priority_levels: 2 default_priority_level: 2"),
        *("with a queue policy no batch is formed ahead", ""),
    ),
    "a preferred size": (
        *("warning", "", f"{X} {Y}", f"preferred_batch_size: 4 {QUEUE}"),
        *("with a queue delay batches of the largest preferred size, 4, grow", f"preferred_batch_size: [4, 8] {QUEUE}"),
    ),
    "an override": (
        *("warning", "", f"{X} {Y}", "default_queue_policy { allow_timeout_override: true }"),
        "allow_timeout_override without default_timeout_microseconds",
        TIMEOUT % "allow_timeout_override: true",
    ),
    "an override of a level": (
        *("warning", "", f"{X} {Y}"),
        "priority_levels: 1 priority_queue_policy { key: 1 value { allow_timeout_override: true } }",
        *("allow_timeout_override without default_timeout_microseconds", ""),
    ),
    "an order": (
        *("warning", "25.09", TWO, "preserve_ordering: true"),
        *("preserve_ordering does not order the answers of several instances in Triton 25.09", ""),
    ),
}


def write(place: Path, tensors: str, batching: str) -> None:
    (place / "m" / "1").mkdir(parents=True, exist_ok=True)
    rows(place / "m" / "1" / "model.onnx")
    (place / "m" / "config.pbtxt").write_text(f"{HEAD} {tensors} {THREADS} dynamic_batching {{ {batching} }}")


def found(place: Path, image: str = "") -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in lint.check(place, image=image)]


@pytest.mark.parametrize("case", CASES)
def test_it_is_named_and_the_way_out_works(case: str, tmp_path: Path) -> None:
    level, image, tensors, wrong, says, right = CASES[case]
    write(tmp_path, tensors, wrong)
    assert [of for of, what in found(tmp_path, image) if what.startswith(says)] == [level], found(tmp_path, image)
    write(tmp_path, tensors, right)
    assert not [what for _, what in found(tmp_path, image) if what.startswith(says)]


@pytest.mark.parametrize(
    ("tensors", "batching", "image"),
    [
        (f"{X} {Y}", "", ""),
        (f"{X} {Y}", "preferred_batch_size: 4", ""),
        (TWO, "preserve_ordering: true", "25.08"),
        (f"{X} {Y}", "preserve_ordering: true", "26.07"),
    ],
)
def test_what_does_as_one_expects_is_passed(tensors: str, batching: str, image: str, tmp_path: Path) -> None:
    write(tmp_path, tensors, batching)
    assert found(tmp_path, image) == []


def test_a_delay_with_a_free_dim_is_no_finding(tmp_path: Path) -> None:
    write(tmp_path, FREE, QUEUE)
    assert not [what for _, what in found(tmp_path) if "delay" in what]


def test_the_count_of_one_instance_stays_right(tmp_path: Path) -> None:
    write(tmp_path, f"{X} {Y}", f"{QUEUE} {TIMEOUT % ''}")
    assert [level for level, _ in found(tmp_path)] == ["warning"]
    write(tmp_path, TWO, f"{QUEUE} {TIMEOUT % ''}")
    assert [level for level, _ in found(tmp_path, "26.08")] == ["warning"]


CURVE = Curve({1: np.array([0.010]), 8: np.array([0.012])})


def run(batching: str, load: Arrivals | None = None, tensors: str = f"{X} {Y}") -> Simulated:
    config = model_config.parse(f"{HEAD} {tensors} dynamic_batching {{ {batching} }}")
    return simulate(load or scheduled(300, 20.0), CURVE, stated(config))


def test_the_scheduler_does_as_the_findings_say() -> None:
    without = run("")
    assert run(QUEUE).quantile(0.5) > without.quantile(0.5) + 0.002
    assert abs(run(QUEUE, tensors=FREE).quantile(0.5) - without.quantile(0.5)) < 0.002
    assert max(run(f"preferred_batch_size: 4 {QUEUE}", scheduled(600, 20.0)).histogram) > 4
    assert max(run("preferred_batch_size: 4", scheduled(600, 20.0)).histogram) == 4
    limited = run("default_queue_policy { max_queue_size: 100 }", scheduled(5, 60.0))
    assert 0.1 < limited.latencies.max() < 0.53


def own(timeouts: Sequence[float], policy: str) -> list[bool]:
    """Return which requests expire that wait for a call of 10 ms with these timeouts of their own."""
    from serve.simulate.arrivals import Kinds

    load = Arrivals(np.full(len(timeouts) + 8, 0.0), Kinds(timeout=[0.0] * 8 + list(timeouts)))
    rows = run(f"default_queue_policy {{ {policy} }}", load).requests[8:]
    return [bool(outcome == EXPIRED) for outcome in rows["outcome"]]


def test_own_timeouts_count_below_a_default() -> None:
    asked = [0.0, 0.001, 0.5]
    assert own(asked, "allow_timeout_override: true") == [False, False, False]
    assert own(asked, "default_timeout_microseconds: 100000 allow_timeout_override: true") == [False, True, False]
    assert own(asked, "default_timeout_microseconds: 100000") == [False, False, False]
    assert own(asked, "default_timeout_microseconds: 1000 allow_timeout_override: true") == [True, True, True]
