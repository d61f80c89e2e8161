"""A test that measures time runs alone; second tries are few: three for such a test, five in a run, none for others."""

import ast
import fcntl
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import turn

ROOT = Path(__file__).parent
CONFTEST = (ROOT / "conftest.py").read_text()

pytest_plugins = ["pytester"]

TEST = """
import pathlib, pytest

@pytest.mark.timed
@pytest.mark.parametrize("number", range({tests}))
def test_at_the_second_try(number, tmp_path_factory):
    seen = pathlib.Path(tmp_path_factory.getbasetemp(), f"seen{{number}}")
    tries = int(seen.read_text()) if seen.exists() else 0
    seen.write_text(str(tries + 1))
    assert tries >= {fails}
"""


def outcome(pytester: pytest.Pytester, tests: int, fails: int) -> tuple[int, str]:
    """Run `tests` tests which pass after `fails` failures each, under the suite's own rules, without their pause."""
    pytester.makeconftest(CONFTEST.replace("reruns_delay=5", "reruns_delay=0"))
    pytester.makeini("[pytest]\nmarkers = timed: x\n  gpu: x\n  slow: x\naddopts = --strict-markers")
    pytester.makepyfile(TEST.format(tests=tests, fails=fails))
    done = pytester.runpytest_subprocess("--numprocesses", "2")
    return int(done.ret), done.stdout.str()


@pytest.mark.parametrize(("tests", "fails", "code"), [(5, 1, 0), (1, 2, 0), (1, 3, 1), (6, 1, 1)])
def test_a_run_may_need_five_second_tries(pytester: pytest.Pytester, tests: int, fails: int, code: int) -> None:
    ended, text = outcome(pytester, tests, fails)
    assert ended == code, text
    assert ("reruns, 5 are allowed" in text) == (tests == 6)


def test_single_tests_are_marked_never_a_whole_file() -> None:
    for path in ROOT.rglob("test_*.py"):
        whole = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        assert not any("timed" in ast.unparse(node) for node in whole if "pytestmark" in ast.unparse(node)), path


def test_who_asks_to_be_alone_is_next_and_alone(tmp_path: Path) -> None:
    order: list[str] = []

    def take(name: str, alone: bool) -> None:
        with turn(tmp_path, alone):
            order.append(f"{name} comes")
            order.append(f"{name} goes")

    with turn(tmp_path, alone=False):
        take("another", alone=False)
        waiting = threading.Thread(target=take, args=("alone", True))
        waiting.start()
        with (tmp_path / "door").open("w") as door, pytest.raises(BlockingIOError):
            while True:  # until the one that waits holds the door
                fcntl.flock(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.flock(door, fcntl.LOCK_UN)
                time.sleep(0.001)
        late = threading.Thread(target=take, args=("late", False))
        late.start()
        order.append("first goes")
    waiting.join()
    late.join()
    names = ["another", "alone", "late"]
    assert order == [
        "another comes",
        "another goes",
        "first goes",
        *(f"{name} {does}" for name in names[1:] for does in ("comes", "goes")),
    ]
