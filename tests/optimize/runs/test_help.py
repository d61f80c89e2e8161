"""The examples of `--help` run as they stand, in an empty folder where `optimize init` wrote its example."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from optimize.cli import main

ROOT = Path(__file__).parents[3]
FIRST = ("init", "check", "run", "export")
NOT_HERE = ("--endpoint", "optimize tensorrt")
"""What needs a server that goes on, or a compiler that is an extra of its own."""


def examples(command: click.Command) -> list[list[str]]:
    """Return the lines below `Example:` in the help of a command, as its user would type them."""
    _, _, below = (command.help or "").partition("Example:")
    lines = below.replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("optimize ")]


EXAMPLES = [
    line
    for name, command in sorted(main.commands.items(), key=lambda each: each[0] not in FIRST)
    for line in examples(command)
]


def runs_here(line: list[str]) -> bool:
    return not any(text in shlex.join(line) for text in NOT_HERE)


def test_each_command_has_an_example_that_is_parsed() -> None:
    assert {line[1] for line in EXAMPLES} == set(main.commands)
    for line in EXAMPLES:
        command = main.commands[line[1]]
        with click.Context(main) as above, command.make_context(line[1], line[2:], parent=above) as context:
            assert context.params


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of the example, which is what most examples are about."""
    folder = tmp_path_factory.mktemp("empty")
    for line in ("init --example digits_cnn", "run digits_cnn.py --recipe digits_cnn.toml --force"):
        done = optimize(line.split(), folder)
        assert done.returncode == 0, done.stderr
    return folder


def optimize(arguments: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "optimize", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in EXAMPLES if runs_here(line)], ids=shlex.join)
def test_an_example_runs_as_it_stands(line: list[str], empty: Path) -> None:
    done = optimize(line[1:], empty)
    # A machine that is busy may leave a promise of speed undecided.
    allowed = (0, 3, 5) if line[1] == "run" else (0,)
    assert done.returncode in allowed, done.stderr
    assert not re.search(r"Traceback|a bug in modelathe|there is no such", done.stderr)
