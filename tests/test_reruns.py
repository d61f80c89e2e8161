"""Second tries are few: three for a test that measures time, five in a run, none for any other test."""

import ast
from pathlib import Path

import pytest

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
    done = pytester.runpytest_subprocess("-p", "no:cacheprovider")
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
