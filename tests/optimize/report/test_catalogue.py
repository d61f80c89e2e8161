"""`optimize methods`: every method says what it does, needs and can be told."""

import json
import subprocess
import sys

import pytest

from optimize.methods.table import METHODS, NAMES
from optimize.report import catalogue


def methods(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "optimize", "methods", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_all_of_itself(name: str) -> None:
    found = catalogue.entry(name)
    assert found["what"].endswith(".") and found["about"]
    assert found["stage"] == METHODS[NAMES[name]].stage
    for option in found["options"]:
        assert option["what"], option["name"]
        assert option["values"] and "typing" not in option["values"] and "<" not in option["values"]


def test_all_methods_are_listed() -> None:
    done = methods()
    assert done.returncode == 0
    assert all(name in done.stdout for name in NAMES)
    assert [found["name"] for found in json.loads(methods("--json").stdout)["methods"]] == [*NAMES]


def test_one_method_is_told_with_its_paper() -> None:
    said = methods("prune.weights").stdout
    assert "arXiv 1506.02626" in said
    assert all(choice in said for choice in ("magnitude", "wanda", "sparsegpt"))
    assert "Works on the torch model." in said


def test_a_method_that_is_none() -> None:
    done = methods("quantize.sttic")
    assert (done.returncode, done.stderr.splitlines()[1]) == (2, "  fix: did you mean quantize.static?")
    assert "list them with: optimize methods" in methods("xyz").stderr
