"""What is released: both archives are built, and the wheel is installed beside nothing else of ours and used."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from modelathe.commandline import version
from tests.docs.blocks import ROOT

ROOMS = ("modelathe", "optimize", "serve", "loadtest")


def made(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it: what the sdist lacks, the wheel lacks."""
    place = tmp_path_factory.mktemp("dist")
    made("-m", "hatchling", "build", "--target", "sdist", "--directory", str(place), cwd=ROOT)
    with tarfile.open(place / f"modelathe-{version()}.tar.gz") as sdist:
        sdist.extractall(place, filter="data")
    unpacked = place / f"modelathe-{version()}"
    made("-m", "hatchling", "build", "--target", "wheel", "--directory", str(place), cwd=unpacked)
    return place


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (found,) = archives.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; packages of others it sees in ours, where ours itself is not among them."""
    place = tmp_path_factory.mktemp("environment")
    made("-m", "venv", "--without-pip", str(place), cwd=place)
    site = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # Path files of a folder that is named in one are not read, so the checkout that is installed there stays out.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    made("-m", "pip", "--python", str(place), "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=place)
    return place


def say(environment: Path, cwd: Path, program: str, *arguments: str) -> str:
    """Run a program of the environment, which sees nothing of the checkout."""
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(environment / "bin" / program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.split() or [
        str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py")
    ]
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not {file for file in files if (ROOT / file).exists()} - held
    assert {name.partition("/")[0] for name in held} == {*ROOMS, f"modelathe-{version()}.dist-info"}


def test_what_the_wheel_says_of_itself(wheel: Path, archives: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    told = email.message_from_string(archive.read(f"modelathe-{version()}.dist-info/METADATA").decode())
    assert told["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text()
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= set(told.get_all("Classifier", []))
    unpacked = archives / f"modelathe-{version()}"
    for link in re.findall(r"\]\(([^)#]+)", told.get_payload()):
        assert (unpacked / link).exists(), f"the long description links to {link}, which the sdist does not hold"


@pytest.mark.parametrize("room", ["optimize", "serve", "loadtest"])
def test_every_command_says_its_version(room: str, environment: Path, tmp_path: Path) -> None:
    assert say(environment, tmp_path, room, "--version").split()[-1] == version()


@pytest.mark.slow
def test_everything_is_found_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    say(environment, tmp_path, "optimize", "init", "--example", "digits_cnn", "--output", "digits")
    say(environment, tmp_path, "optimize", "init", "--output", "own")
    assert "def workload" in (tmp_path / "own" / "workload.py").read_text()
    assert "accuracy" in say(environment, tmp_path, "optimize", "evaluate", "digits/digits_cnn.py:workload", "--json")
    assert "quantize.static" in say(environment, tmp_path, "optimize", "methods")
    assert "soak" in say(environment, tmp_path, "loadtest", "scenario", "list")
    where = "import modelathe, optimize, serve, loadtest; print(modelathe.__file__, optimize.__file__, serve.__file__)"
    for path in say(environment, tmp_path, "python", "-P", "-c", where).split():
        assert path.startswith(str(environment)), path
