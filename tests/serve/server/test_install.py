import json
import shutil
from pathlib import Path

import pytest

from serve.config.errors import NotInstalled
from serve.server import install
from tests.serve.commands.test_up import serve


def test_complete_environment_is_left_as_it_is(server_prefix: Path) -> None:
    before = (server_prefix / "modelathe-server.json").stat().st_mtime_ns
    said: list[str] = []
    assert install.install(server_prefix, said.append) == server_prefix
    assert not said
    assert (server_prefix / "modelathe-server.json").stat().st_mtime_ns == before


def test_parts_are_there(server_prefix: Path) -> None:
    found = install.environment(server_prefix)
    for path in (found.python, found.tritonserver, found.backends, found.site_packages, found.libdir):
        assert path.is_absolute()
        assert path.exists()


def test_prefix_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MODELATHE_SERVER", str(tmp_path / "here"))
    assert install.prefix() == tmp_path / "here"
    monkeypatch.delenv("MODELATHE_SERVER")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert install.prefix() == tmp_path / "modelathe" / "server"


def test_json(server_prefix: Path) -> None:
    done = serve("install", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["prefix"] == str(server_prefix)


def test_install_that_fails_names_the_reason(tmp_path: Path) -> None:
    place = tmp_path / "server"
    (place / "lib").mkdir(parents=True)  # what an install leaves that was killed early
    (place / "modelathe-server.json").write_text("{}")
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = serve("install", "--prefix", str(place), env=nowhere)
    assert done.returncode == 5
    assert "No matching distribution found for nvidia-pytriton" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(NotInstalled, match="not installed"):
        install.environment(place)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep")
    with pytest.raises(NotInstalled, match="not a folder that modelathe made"):
        install.install(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "keep"


@pytest.fixture
def copy(server_prefix: Path, tmp_path: Path) -> Path:
    """A prefix with the real marker and interpreter, and none of the packages."""
    place = tmp_path / "server"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").symlink_to(server_prefix / "bin" / "python")
    (place / "modelathe-server.json").write_text((server_prefix / "modelathe-server.json").read_text())
    shutil.copytree(server_prefix / "backends", place / "backends")
    install.environment(place)
    return place


def test_another_list_of_packages_is_noticed(copy: Path) -> None:
    marker = json.loads((copy / "modelathe-server.json").read_text())
    (copy / "modelathe-server.json").write_text(json.dumps({**marker, "digest": "0"}))
    with pytest.raises(NotInstalled, match="another version of modelathe"):
        install.environment(copy)


def test_older_backend_is_replaced_without_installing_again(copy: Path) -> None:
    (copy / "backends" / "onnxruntime" / "model.py").write_text("# older")
    with pytest.raises(NotInstalled, match="another version of modelathe"):
        install.environment(copy)
    said: list[str] = []
    install.install(copy, said.append)
    assert not said
    install.environment(copy)


def test_vanished_interpreter_is_noticed(copy: Path) -> None:
    (copy / "bin" / "python").unlink()
    (copy / "bin" / "python").symlink_to(copy / "gone")
    with pytest.raises(NotInstalled):
        install.environment(copy)
