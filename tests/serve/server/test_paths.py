"""Paths and names with letters that a shell treats in its own way, and backend processes that do not start."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modelathe.client import connect
from serve.config.errors import BadRepository, ServerFailed
from serve.repository import lint, scratch, staging
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_WEIGHT

X = np.ones((1, 4), np.float32)


def answers(place: Path, model: str = TINY) -> None:
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        np.testing.assert_allclose(client.infer(model, {"x": X})["y"], X @ TINY_WEIGHT, rtol=1e-6)


@pytest.mark.parametrize("name", ["my models", "Müller's (2)", "a&b; $(exit) `exit` *", 'say "x" <y> | z'])
def test_any_path_to_a_repository(
    name: str, tmp_path: Path, server_prefix: Path, publish_tiny: Callable[..., staging.Version]
) -> None:
    place = tmp_path / name / "repository"
    publish_tiny(place)
    answers(place)
    assert not list(scratch.Path(scratch.tempfile.gettempdir()).glob("*/repository"))


def test_where_temporary_files_have_such_a_path_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server_prefix: Path,
    publish_tiny: Callable[..., staging.Version],
) -> None:
    place = tmp_path / "my models"
    publish_tiny(place)
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(place))
    with pytest.raises(BadRepository, match="have letters such as ' ' in them") as caught, running(place):
        pass
    assert "TMPDIR=/tmp" in caught.value.fix
    monkeypatch.setattr(scratch.tempfile, "tempdir", "/tmp")
    answers(place)


@pytest.mark.parametrize("name", ["my tiny", "tïny", "tiny$1"])
def test_the_name_of_a_model(
    name: str, tmp_path: Path, server_prefix: Path, publish_tiny: Callable[..., staging.Version]
) -> None:
    publish_tiny(tmp_path / "repository")
    home = (tmp_path / "repository" / TINY).rename(tmp_path / "repository" / name)
    config = home / "config.pbtxt"
    (home / "1" / "lineage.json").unlink()
    config.write_text(config.read_text().replace(f'name: "{TINY}"\nversion', f'name: "{name}"\nversion'))
    with pytest.raises(BadRepository, match="has a name with other letters") as caught, running(home.parent):
        pass
    assert caught.value.fix == "rename its folder, and set the same name in its config.pbtxt"
    assert [finding.level for finding in lint.check(home.parent)] == ["error"]
    home.rename(home.with_name("other"))
    config = home.with_name("other") / "config.pbtxt"
    config.write_text(config.read_text().replace(f'name: "{name}"\nversion', 'name: "other"\nversion'))
    answers(home.parent, "other")


ENDS = {
    "while it is imported": "import os\nos._exit(1)",
    "killed from outside": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "while it loads": """
import os
class TritonPythonModel:
    def initialize(self, args):
        print("no such device", flush=True)
        os._exit(3)
""",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_dies_while_it_starts_is_noticed(how: str, tmp_path: Path, server_prefix: Path) -> None:
    home = tmp_path / "repository" / "dies"
    (home / "1").mkdir(parents=True)
    (home / "1" / "model.py").write_text(ENDS[how])
    tensors = (
        'input [{ name: "x" data_type: TYPE_FP32 dims: [4] }] output [{ name: "y" data_type: TYPE_FP32 dims: [4] }]'
    )
    (home / "config.pbtxt").write_text(f'backend: "python" {tensors} instance_group [{{ kind: KIND_CPU }}]')
    with pytest.raises(ServerFailed) as caught, running(home.parent, timeout=60):
        pass
    assert "not ready after" not in caught.value.what
