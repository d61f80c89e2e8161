"""What pyproject.toml and the environment say of the options of the three commands."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from modelathe import defaults
from modelathe.commandline import CommandGroup, emit, json_option
from modelathe.errors import UsageError
from optimize.cli import main as optimize
from serve.cli import main as serve


@click.group("room", cls=CommandGroup)
def room() -> None:
    """A room."""


@room.command()
@click.option("--http-port", type=int, default=8000)
@click.option("--probe/--no-probe", default=True)
@click.option("--set", "settings", multiple=True)
@click.option("--allow-invalid", is_flag=True)
@click.option("--check/--no-check", default=True)
@json_option
def up(as_json: bool, http_port: int, probe: bool, settings: tuple[str, ...], allow_invalid: bool, check: bool) -> None:
    """Say what was given."""
    assert check and not allow_invalid
    emit({"port": http_port, "probe": probe, "settings": settings, "json": as_json})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pyproject.toml"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    with pytest.raises(SystemExit) as ended:
        room.main(["up", *arguments])
    assert ended.value.code == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_each_goes_before_the_next(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(capsys)["port"] == 8000
    project.write_text('[tool.modelathe.room.up]\nhttp-port = 9000\nno-probe = true\nset = ["a=1", "b=2"]\n')
    assert said(capsys) == {"port": 9000, "probe": False, "settings": ["a=1", "b=2"], "json": False}
    monkeypatch.setenv("ROOM_UP_HTTP_PORT", "9001")
    monkeypatch.setenv("ROOM_UP_ALLOW_INVALID", "1")
    monkeypatch.setenv("ROOM_UP_CHECK", "0")
    assert said(capsys)["port"] == 9001
    assert said(capsys, "--http-port", "9002", "--probe") == {
        **{"port": 9002, "probe": True},
        **{"settings": ["a=1", "b=2"], "json": False},
    }


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[tool.modelathe.room.up]\nhttp-prot = 1\n", "unknown key 'http-prot' in .tool.modelathe.room.up."),
        ("[tool.modelathe.room.upp]\n", "unknown key 'upp' in .tool.modelathe.room."),
        ("[tool.modelathe.room]\nup = 3\n", "tool.modelathe.room.up is 3, not a table"),
        ("[tool.modelathe.room.up]\njson = true\n", "unknown key 'json'"),
        ("[tool.modelathe\n", "cannot be read"),
        ("[tool.modelathe.room.up]\nallow-invalid = true\n", "allow-invalid loosens a proof"),
        ("[tool.modelathe.room.up]\nno-check = true\n", "no-check loosens a proof"),
    ],
)
def test_what_nothing_is_called_is_refused(text: str, wrong: str, project: Path) -> None:
    project.write_text(text)
    with pytest.raises(UsageError, match=wrong):
        defaults.read(room)


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", "[tool.modelathe.other.up]\nhttp-prot = 1\n"])
def test_what_is_others_is_left_alone(text: str, project: Path) -> None:
    project.write_text(text)
    assert defaults.read(room) == {}


def test_a_value_that_cannot_be_is_told_as_one(project: Path) -> None:
    project.write_text('[tool.modelathe.optimize.run]\nrecipe = "r"\npatience = "long"\n')
    done = subprocess.run([sys.executable, "-m", "optimize", "run", "x.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--patience': 'long'" in done.stderr


def test_real_commands_read_them(project: Path) -> None:
    project.write_text(
        "[tool.modelathe.serve.up]\nhttp-port = 9000\n[tool.modelathe.serve.pipeline.text]\nmax-tokens = 9\n"
        '[tool.modelathe.optimize.run]\nrecipe = "recipe.toml"\nstrict = true\n'
    )
    assert defaults.read(serve) == {"up": {"http_port": 9000}, "pipeline": {"text": {"max_tokens": 9}}}
    assert defaults.read(optimize) == {"run": {"recipe_path": "recipe.toml", "strict": True}}


@click.group("place", cls=CommandGroup)
def place() -> None:
    """A room whose commands look at their values in three places."""


def _even(_context: click.Context, _option: click.Parameter, value: int) -> int:
    if value % 2:
        raise UsageError(f"{value} is odd", fix="give an even one")
    return value


@place.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0)
@click.option("--even", type=int, default=0, callback=_even)
@click.option("--arrival", default="constant")
def go(port: int, even: int, arrival: str) -> None:
    """Refuse an arrival."""
    if arrival != "constant":
        raise UsageError(f"there is no arrival {arrival}", fix="say constant")


@pytest.mark.parametrize(
    ("option", "value"), [("port", "70000"), ("even", "3"), ("arrival", "poison")], ids=["type", "callback", "command"]
)
def test_a_wrong_value_names_where_it_comes_from(
    option: str, value: str, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            place.main(["go", *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "pyproject.toml" not in refused(f"--{option}", value)
    project.write_text(f'[tool.modelathe.place.go]\n{option} = "{value}"\n')
    assert f"error: pyproject.toml, {option} of go: " in refused()
    monkeypatch.setenv(f"PLACE_GO_{option.upper()}", value)
    said = refused()
    assert f"error: the environment variable PLACE_GO_{option.upper()}: " in said
    assert "pyproject.toml" not in said
