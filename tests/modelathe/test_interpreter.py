"""A line that we print to be typed runs where it is read."""

import sys
from pathlib import Path

import pytest

from modelathe import interpreter

HOME = Path(sys.executable).parent


@pytest.mark.parametrize("active", [True, False])
def test_a_program_is_called_as_the_user_can_call_it(
    active: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{HOME}:/usr/bin" if active else "/usr/bin")
    said = interpreter.program("serve")
    assert said == "serve" if active else (tmp_path / said).samefile(HOME / "serve")


def test_another_installation_first_on_the_path_is_not_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "serve"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{HOME}")
    assert Path(interpreter.program("serve")).samefile(HOME / "serve")


def test_a_path_is_relative_where_that_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.chdir(HOME.parent.parent)
    assert interpreter.program("serve") == f"{HOME.parent.name}/{HOME.name}/serve"


def test_a_program_that_has_no_script_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert interpreter.program("no-such-script") == "no-such-script"
