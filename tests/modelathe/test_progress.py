"""What goes on is told as plain lines or on a terminal, with how far it is, unless nobody wants to hear it."""

import inspect
import sys
from collections.abc import Iterator

import click
import pytest

from loadtest import cli as loadtest_cli
from modelathe import commandline
from modelathe.commandline import CommandGroup, emit, how_far, json_option, quiet_option, reporting
from optimize import cli as optimize_cli
from serve import cli as serve_cli
from tests.terminal import on_a_terminal

PRINTS = ("reporting()", "live.shown(", "_say", "progress=lambda", ".calls")


@click.group("room", cls=CommandGroup)
def room() -> None:
    """A room."""


@room.command()
@quiet_option
@json_option
def work(as_json: bool) -> None:
    """Work in two stages."""
    with reporting() as progress:
        progress("reading", 0.0)
        progress("training: epoch 2", 0.4)
        progress("training: epoch 3", 0.7)
    if as_json:
        emit({"done": True})
    else:
        click.echo("the result")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is ten seconds later."""
    now = [0.0]

    def clock() -> float:
        now[0] += 10.0
        return now[0]

    monkeypatch.setattr(commandline.time, "monotonic", clock)


@pytest.mark.usefixtures("seconds")
def test_a_long_step_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        room.main(["work"])
    said = capsys.readouterr()
    assert said.out == "the result\n"
    # What was done when the stage was first told says nothing of its speed.
    assert said.err == "reading\ntraining: epoch 2 (40 %)\ntraining: epoch 3 (70 %, 20 s left)\n"


@pytest.mark.parametrize("arguments", [("--quiet",), ("--quiet", "--json")])
def test_quiet_prints_the_result_alone(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        room.main(["work", *arguments])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("the result\n" if "--json" not in arguments else '{\n  "done": true\n}\n', "")


def test_the_time_left_is_that_of_the_speed_so_far() -> None:
    assert how_far(0.5, 0.0, 10.0) == "50 %, 10 s left"
    assert how_far(0.25, 0.0, 100.0) == "25 %, 5 min left"
    assert how_far(0.75, 0.5, 10.0) == "75 %, 10 s left"
    assert how_far(0.5, 0.5, 10.0) == "50 %"


def test_a_terminal_shows_it_too() -> None:
    code = (
        "import time\n"
        "from modelathe.commandline import reporting\n"
        "with reporting() as progress:\n"
        "    for done in (0.0, 0.25, 0.5):\n"
        "        progress('training: an epoch', done)\n"
        "        time.sleep(0.3)\n"
    )
    assert "50 %, 1 s left" in on_a_terminal(80, sys.executable, "-c", code)


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for inner, below in command.commands.items():
            yield from commands(below, f"{name} {inner}")
    else:
        yield name, command


ALL = [
    *commands(optimize_cli.main, "optimize"),
    *commands(serve_cli.main, "serve"),
    *commands(loadtest_cli.main, "loadtest"),
]


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_what_prints_progress_can_be_told_not_to(name: str, command: click.Command) -> None:
    assert command.callback
    module = inspect.getmodule(inspect.unwrap(command.callback))
    assert module
    inner = inspect.getsource(module)
    # What `serve up` prints is where its server answers.
    if name != "serve up" and any(text in inspect.getsource(inspect.unwrap(command.callback)) for text in PRINTS):
        assert "--quiet" in [flag for option in command.params for flag in option.opts]
    elif "--quiet" in [flag for option in command.params for flag in option.opts]:
        assert any(text in inner for text in PRINTS)
