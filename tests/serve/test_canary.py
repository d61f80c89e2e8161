"""Canary: two versions, the same requests, and thresholds that decide."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loadtest import payload
from serve import canary, repository, staging
from serve.canary import Comparison, Thresholds
from serve.errors import BadRepository
from tests.conftest import TINY, TINY_INPUTS, TINY_WEIGHT
from tests.serve.test_up import serve

pytestmark = pytest.mark.timed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, publish_tiny: Callable[..., staging.Version]) -> Path:
    """Version 2 is a little different, version 3 answers something else."""
    place = tmp_path_factory.mktemp("canary") / "model_repository"
    publish_tiny(place)
    publish_tiny(place, weight=TINY_WEIGHT * np.float32(1.01))
    publish_tiny(place, weight=TINY_WEIGHT[::-1] - np.float32(1))
    return place


def passed(found: Comparison, **wanted: float) -> dict[str, bool]:
    return {entry.name: entry.passed for entry in found.judge(Thresholds(**wanted))}


def test_versions_are_compared_request_by_request(place: Path, server_prefix: Path) -> None:
    requests = payload.generate(TINY_INPUTS, 40, 0, 3)
    found = canary.compare(place, TINY, 1, 2, requests)
    assert (found.requests, found.failed) == (40, 0)
    assert found.agreement == pytest.approx(1)
    largest = max(float((request["x"] @ TINY_WEIGHT).max()) for request in requests)
    assert found.difference == pytest.approx(0.01 * largest, rel=1e-3)
    assert passed(found, slowdown=100, difference=0.1) == dict.fromkeys(
        ("answered", "agreement", "not slower", "difference"), True
    )
    assert not passed(found, slowdown=100, difference=1e-3)["difference"]
    low, value, high = found.slowdown[1], found.slowdown[0], found.slowdown[2]
    assert low <= value <= high
    assert set(found.latency_ms) == {"old", "new"}
    # What is compared is not touched.
    assert sorted(path.name for path in (place / TINY).iterdir()) == ["1", "2", "3", "config.pbtxt"]
    repository.verify(place)


def test_the_command_decides(place: Path, server_prefix: Path, tmp_path: Path) -> None:
    at = ("--repository", str(place), "--max-slowdown", "100")
    np.savez(tmp_path / "recorded.npz", x=np.random.default_rng(0).random((30, 4), dtype=np.float32))
    fine = serve("canary", TINY, "1", "2", *at, "--requests", str(tmp_path / "recorded.npz"))
    assert fine.returncode == 0, fine.stderr
    assert "passed answered: 0 of 30 failed, wanted none" in fine.stdout
    other = serve("canary", TINY, "1", "3", *at, "--count", "20", "--json")
    assert other.returncode == 3
    document = json.loads(other.stdout)
    assert [entry["name"] for entry in document["thresholds"] if not entry["passed"]] == ["agreement"]
    assert document["error"]["kind"] == "CanaryRefused"
    assert document["agreement"] < 0.9
    missing = serve("canary", TINY, "1", "9", *at)
    assert (missing.returncode, missing.stderr.splitlines()[-1]) == (4, "  fix: there are 1, 2, 3")


def test_a_changed_version_is_not_compared(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy" / TINY / "2" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BadRepository, match="changed after it was published"):
        canary.compare(tmp_path / "copy", TINY, 1, 2, [])


ROW = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("old", "new", "likeness"),
    [
        (ROW, ROW, 1),
        (ROW, 3 * ROW, 1),
        (ROW, ROW[::-1], 0),
        (ROW, -ROW, -1),
        (np.zeros((2, 2)), np.zeros((2, 2)), 1),
        (np.zeros((2, 2)), np.ones((2, 2)), 0),
        (np.full((1, 2), np.nan), np.full((1, 2), np.nan), 1),
        (np.full((1, 2), np.nan), np.ones((1, 2)), 0),
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), 0.75),
        (np.array([[b"a"], [b"b"]], object), np.array([[b"a"], [b"c"]], object), 0.5),
        (ROW, ROW[:1], 0),
        (ROW, None, 0),
        (ROW[:0], ROW[:0], 1),
    ],
)
def test_likeness(old: np.ndarray, new: np.ndarray | None, likeness: float) -> None:
    assert canary._likeness(old, new) == pytest.approx(likeness)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        (ROW, ROW + 0.5, 0.5),
        (ROW, np.full_like(ROW, np.nan), np.inf),
        (np.full_like(ROW, np.nan), ROW, np.inf),
        (np.full_like(ROW, np.nan), np.full_like(ROW, np.nan), 0),
        (np.full_like(ROW, np.inf), np.full_like(ROW, np.inf), 0),
        (ROW, np.full_like(ROW, -np.inf), np.inf),
        (ROW, ROW[:1], np.inf),
        (ROW[:0], ROW[:0], 0),
        (ROW, None, np.inf),
        (np.array([1]), np.array([2]), 0),
    ],
)
def test_difference(old: np.ndarray, new: np.ndarray | None, difference: float) -> None:
    assert canary._difference(old, new) == difference


def pair(old: object, new: object, seconds: tuple[float, float] = (1.0, 1.0)) -> dict[str, object]:
    return {"old": (old, seconds[0]), "new": (new, seconds[1])}


def test_failures_and_times_are_counted() -> None:
    good = {"y": ROW}
    found = canary._summary([pair(good, good), pair(good, "no"), pair("no", "no"), pair("no", good)])
    assert (found.requests, found.failed, found.refused) == (4, 1, "no")
    assert not passed(found)["answered"]
    slow = canary._summary([pair(good, good, (1.0, 2.0 + 0.001 * n)) for n in range(30)])
    assert not passed(slow)["not slower"]
    assert passed(slow, slowdown=2.1)["not slower"]
    nothing = canary._summary([pair("no", "no")])
    assert not passed(nothing)["agreement"]
    assert nothing.refused == "no"
