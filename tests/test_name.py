"""The name: what 0.1, which was called lathe, left behind is read, or refused with the line that converts it."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import optimize
from loadtest.record import results
from modelathe.commandline import install_line
from optimize.model.errors import BadWorkload
from optimize.source.load import load_workload
from optimize.step import bundle
from optimize.step.bundle import Bundle
from serve.config import model_config
from serve.config.errors import NotInstalled
from serve.server import install
from tests.optimize.conftest import SMALL


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (None, "pip install 'modelathe[ray]'"),
        ('{"url": "file:///srv/modelathe.whl"}', "pip install 'modelathe[ray] @ file:///srv/modelathe.whl'"),
    ],
)
def test_an_extra_comes_from_where_modelathe_came_from(
    monkeypatch: pytest.MonkeyPatch, told: str | None, line: str
) -> None:
    found = SimpleNamespace(read_text=lambda _name: told)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _name: found)
    assert install_line("ray") == line


def test_in_a_tree_that_was_never_installed_it_comes_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert install_line("ray") == "pip install -e '.[ray]'"


def test_parameters_of_a_configuration_have_the_new_name() -> None:
    text = 'name: "m" parameters { key: "lathe.nonfinite" value { string_value: "refuse" } }'
    config = model_config.parse(text)
    assert {key: entry.string_value for key, entry in config.parameters.items()} == {"modelathe.nonfinite": "refuse"}


def test_the_variable_of_the_server_has_the_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELATHE_SERVER", raising=False)
    monkeypatch.setenv("LATHE_SERVER", "/srv/server")
    with pytest.raises(NotInstalled, match="called MODELATHE_SERVER") as error:
        install.prefix()
    assert error.value.fix == "set MODELATHE_SERVER=/srv/server"


def test_a_server_in_the_former_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELATHE_SERVER", "LATHE_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "lathe" / "server").mkdir(parents=True)
    with pytest.raises(NotInstalled) as error:
        install.environment()
    assert error.value.fix == f"run: serve install; {tmp_path}/lathe/server, which 0.1 made, is used no more"


def test_a_former_environment_is_ours_to_replace(tmp_path: Path) -> None:
    (tmp_path / "lathe-server.json").write_text("{}")
    (tmp_path / "lib").mkdir()
    install._empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["modelathe-server.json"]


def test_a_result_file_of_the_former_name_is_read(tmp_path: Path) -> None:
    header = {"plan": {"duration": 1.0}, "model": "m", "url": "grpc://127.0.0.1:1", "lathe": "0.1.0"}
    with results.Writer(tmp_path / "r.jsonl", header) as writer:
        writer.add(results.Flight(0, 0.0, 0, sent=0.01, done=0.02))
        writer.finish({"end": 1.0, "server": None})
    assert results.read(tmp_path / "r.jsonl").of(results.OK).tolist() == [True]


def test_a_bundle_that_names_the_former_version_is_read(tmp_path: Path) -> None:
    made = load_workload(f"{SMALL}:workload")
    bundle.save(Bundle(made, made.build()), tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**{key: told[key] for key in told if key != "modelathe"}, "lathe": "0.1.0"}))
    assert bundle.describe(tmp_path / "bundle")["modelathe"] == "0.1.0"
    assert bundle.load(tmp_path / "bundle").module is not None


@pytest.mark.parametrize("line", ["from loadtest.tensors import BATCH", "from optimize.workload import Workload"])
def test_a_workload_that_imports_as_in_0_1_is_told_the_new_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.py").write_text(line)
    with pytest.raises(BadWorkload, match="No module named") as error:
        load_workload(f"{tmp_path / 'mine.py'}:workload")
    assert "from optimize import BATCH, Batch, Dim, TensorSpec, Workload" in error.value.fix


def test_public_names_come_from_the_room() -> None:
    code = "import sys, optimize\nassert 'torch' not in sys.modules\n"
    code += "from optimize import BATCH, Workload\nprint(*optimize.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BATCH", "Batch", "Dim", "TensorSpec", "Workload", "compare", "evaluate", "run"]
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        optimize.Nothing  # noqa: B018
