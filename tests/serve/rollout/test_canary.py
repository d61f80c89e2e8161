"""Canary: two versions, the same requests, and thresholds that decide."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from loadtest.plan.data import payload
from serve.cli import main
from serve.commands.canary import _way_out as way_out
from serve.config.errors import BadRepository
from serve.repository import staging
from serve.repository import tree as repository
from serve.rollout import canary
from serve.rollout.canary import Comparison, Thresholds
from tests.conftest import TINY, TINY_INPUTS, TINY_WEIGHT
from tests.serve.commands.test_up import serve


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
    requests = payload.generate(TINY_INPUTS, 120, 0, 3)
    found = canary.compare(place, TINY, 1, 2, requests)
    assert (found.requests, found.failed, len(found.rows.likeness)) == (120, 0, 360)
    # Rows of three values are compared by their relative error, here one hundredth.
    assert found.rows.likeness.min() == pytest.approx(1 - 0.01 / 1.01, abs=1e-4)
    largest = max(float((request["x"] @ TINY_WEIGHT).max()) for request in requests)
    assert found.rows.difference == pytest.approx(0.01 * largest, rel=1e-3)
    asked = {"slowdown": 100, "unlike": 0.05, "flips": 0.05, "agreement": 0.98}
    assert passed(found, **asked, difference=0.1) == dict.fromkeys(
        ("answered", "agreement", "labels", "not slower", "not slower in all", "difference"), True
    )
    assert not passed(found, **asked, difference=1e-3)["difference"]
    low, value, high = found.slowdown[1], found.slowdown[0], found.slowdown[2]
    assert low <= value <= high
    assert set(found.latency_ms) == {"old", "new"}
    # What is compared is not touched.
    assert sorted(path.name for path in (place / TINY).iterdir()) == ["1", "2", "3", "config.pbtxt"]
    repository.verify(place)


def test_the_command_decides(place: Path, server_prefix: Path, tmp_path: Path) -> None:
    at = ("--repository", str(place), "--max-slowdown", "100", "--min-agreement", "0.98")
    np.savez(tmp_path / "recorded.npz", x=np.random.default_rng(0).random((400, 4), dtype=np.float32))
    fine = serve("canary", TINY, "1", "2", *at, "--requests", str(tmp_path / "recorded.npz"))
    assert fine.returncode == 0, fine.stderr
    assert "passed answered: 0 of 400 failed, wanted none" in fine.stdout
    few = serve("canary", TINY, "1", "2", *at, "--count", "20")
    assert few.returncode == 3
    assert "whether version 2 is like 1 is undecided" in few.stderr
    assert "send more requests, about" in few.stderr
    other = serve("canary", TINY, "1", "3", *at, "--count", "20", "--json")
    assert other.returncode == 3
    document = json.loads(other.stdout)
    broken = [entry["name"] for entry in document["thresholds"] if entry["verdict"] == "broken"]
    assert broken == ["agreement"]
    assert document["error"]["kind"] == "CanaryRefused"
    assert document["agreement"] < 0.9
    missing = serve("canary", TINY, "1", "9", *at)
    assert (missing.returncode, missing.stderr.splitlines()[-1]) == (4, "  fix: there are 1, 2, 3")


SHARES, OTHERS = ("--max-unlike", "--max-flips"), ("--min-agreement", "--max-difference", "--max-slowdown")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        *((option, value, f"{option} {value} can hardly pass") for option in SHARES for value in ("0", "1e-12")),
        *((option, "2", "not in the range") for option in SHARES),
        *((option, "nan", "nan is not a finite number") for option in (*SHARES, *OTHERS)),
    ],
)
def test_a_threshold_that_can_never_pass_is_refused(place: Path, option: str, value: str, words: str) -> None:
    done = CliRunner().invoke(main, ["canary", TINY, "1", "2", "--repository", str(place), option, value])
    assert (done.exit_code, words in done.stderr) == (2, True), done.output
    assert len(done.stderr.splitlines()) == 2


def test_a_changed_version_is_not_compared(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy" / TINY / "2" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(BadRepository, match="changed after it was published"):
        canary.compare(tmp_path / "copy", TINY, 1, 2, [])


ROW = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)


def pair(old: object, new: object, seconds: tuple[float, float] = (1.0, 1.0)) -> dict[str, object]:
    return {"old": (old, seconds[0]), "new": (new, seconds[1])}


def verdicts(found: Comparison, **wanted: float) -> dict[str, str]:
    return {entry.name: entry.verdict for entry in found.judge(Thresholds(**wanted))}


def test_failures_and_times_are_counted() -> None:
    good = {"y": ROW}
    found = canary._summary([pair(good, good), pair(good, "no"), pair("no", "no"), pair("no", good)])
    assert (found.requests, found.failed, found.refused) == (4, 1, "no")
    assert verdicts(found)["answered"] == "broken"
    slow = canary._summary([pair(good, good, (1.0, 2.0 + 0.0001 * n)) for n in range(120)])
    assert verdicts(slow)["not slower"] == verdicts(slow)["not slower in all"] == "broken"
    assert verdicts(slow, slowdown=2.1)["not slower"] == "passed"
    nothing = canary._summary([pair("no", "no")])
    assert set(verdicts(nothing).values()) == {"undecided"}
    assert nothing.refused == "no"


FINE, WRONG = {"y": np.ones((1, 4), np.float32)}, {"y": -np.ones((1, 4), np.float32)}
ALLOW = "leave the old one live, or give thresholds that allow what was measured"


@pytest.mark.parametrize(
    ("pairs", "fix"),
    [
        ([pair(FINE, FINE)] * 5, "send more requests, about "),
        ([pair(FINE, FINE)] * 99 + [pair("no", "no")] * 900, "send more requests, about "),
        ([pair("no", "no")] * 5, "send requests that both answer"),
        # More than the limit of 1 % are wrong, but so few were sent that it may be chance.
        ([pair(FINE, FINE)] * 380 + [pair(FINE, WRONG)] * 6, ALLOW),
        ([pair(FINE, FINE, (1.0, 1.5))] * 5, ALLOW),
        ([pair(FINE, WRONG)] * 400, ALLOW),
        ([pair(FINE, FINE)] * 5 + [pair(FINE, "no")], "leave the old one live, or publish a version that answers"),
    ],
)
def test_the_way_out_is_a_true_one(pairs: list[dict[str, object]], fix: str) -> None:
    found = canary._summary(pairs)
    judged = [entry for entry in found.judge(Thresholds()) if not entry.passed]
    broken = [entry for entry in judged if entry.verdict == "broken"]
    said = way_out(found, broken or judged)
    assert said.startswith(fix)
    if "about" in said:
        assert int(said.rpartition(" ")[2].replace(",", "")) > found.requests


def answers(old: object, new: object, count: int, batched: bool = True) -> dict[str, str]:
    """The verdicts on so many requests, answered equally fast, with these values of one float output."""
    one, two = ({"y": np.array(values, np.float32)} for values in (old, new))
    return verdicts(canary._summary([pair(one, two)] * count, batched))


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ([[0.1]], [[1000.0]], "agreement"),  # their cosine is 1
        ([[0.1, 0.1, 0.1, 0.1]], [[1000.0] * 4], "agreement"),  # as is that of a longer row
        ([[10.0, 9.0]], [[9.0, 10.0]], "labels"),
        ([[1.0, 2.0, 3.0, 30.0, 29.9]], [[1.0, 2.0, 3.0, 29.9, 30.0]], "labels"),
        ([[1.0]], [[np.nan]], "agreement"),
        ([[np.nan]], [[np.nan]], "agreement"),
        ([[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, np.nan, 4.0]], "agreement"),
        ([[1.0]], [[-1.0]], "agreement"),
        ([[1.0]], [[1e6]], "agreement"),
    ],
)
def test_what_is_wrong_is_never_passed(old: object, new: object, wrong: str) -> None:
    for count in (1, 5, 50, 500):
        assert answers(old, new, count)[wrong] != "passed"
    assert answers(old, new, 500)[wrong] == "broken"


def test_the_worst_rows_decide_not_the_mean() -> None:
    fine, wrong = {"y": np.ones((1, 4), np.float32)}, {"y": -np.ones((1, 4), np.float32)}
    pairs = [pair(fine, wrong if number % 50 == 0 else fine) for number in range(1000)]
    found = canary._summary(pairs)
    assert found.document()["agreement"] > 0.95
    assert verdicts(found)["agreement"] == "broken"
    assert verdicts(found, agreement=0.99, unlike=0.05)["agreement"] == "passed"


def test_few_requests_decide_nothing() -> None:
    same = {"y": np.ones((1, 4), np.float32)}
    few = canary._summary([pair(same, same)] * 5)
    assert verdicts(few) == {"answered": "passed"} | dict.fromkeys(
        ("agreement", "labels", "not slower", "not slower in all"), "undecided"
    )
    more = {entry.name: entry.requests for entry in few.judge(Thresholds())}
    for name in ("agreement", "labels"):
        assert 300 < (more[name] or 0) <= 800
    many = canary._summary([pair(same, same)] * 400)
    assert set(verdicts(many).values()) == {"passed"}


def test_four_of_five_requests_three_times_slower() -> None:
    same = {"y": np.ones((1, 4), np.float32)}
    for times in (1, 100):
        pairs = [pair(same, same, (1.0, 1.0 if number == 0 else 3.0)) for number in range(5)] * times
        found = verdicts(canary._summary(pairs))
        assert "passed" not in (found["not slower"], found["not slower in all"])
    # A third of them leaves the median as it was.
    pairs = [pair(same, same, (1.0, 3.0 if number % 3 == 0 else 1.0)) for number in range(400)]
    found = verdicts(canary._summary(pairs))
    assert (found["not slower"], found["not slower in all"]) == ("passed", "broken")


@pytest.mark.parametrize(("true", "least", "most"), [(1.0, 0.9, 1.0), (1.1, 0.0, 0.05), (1.2, 0.0, 0.0)])
@pytest.mark.parametrize("stalls", [0.0, 0.01])
def test_latency_is_decided_rightly(true: float, least: float, most: float, stalls: float) -> None:
    """Of 60 simulated canaries each: the share that passes a limit of 1.1; 30 % noise and rare stalls."""
    rng, passed = np.random.default_rng(1), 0
    for _ in range(60):
        old, new = (rng.lognormal(0, 0.3, 400) * (1 + 20 * (rng.random(400) < stalls)) for _ in range(2))
        found = [canary._median(true * new / old), canary._total(old, true * new)]
        passed += all(canary._verdict(low, high, 1.1) == "passed" for _, low, high in found)
    assert least * 60 <= passed <= most * 60 + 1


@pytest.mark.parametrize("count", [8, 25, 100, 400])
def test_intervals_cover(count: int) -> None:
    rng, covered = np.random.default_rng(2), np.zeros(2)
    for _ in range(150):
        old, new = (rng.lognormal(0, 0.3, count) for _ in range(2))
        for place, (_, low, high) in enumerate((canary._median(new / old), canary._total(old, new))):
            covered[place] += low <= 1 <= high
    assert (covered / 150 >= 0.91).all()


def test_an_interval_with_nan_is_undecided() -> None:
    assert canary._verdict(np.nan, np.nan, 1.0) == "undecided"
    assert canary._verdict(0.0, np.nan, 1.0) == "undecided"
