import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modelathe import files
from modelathe.errors import UsageError
from modelathe.tensors import TensorSpec
from serve.config import model_config
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import staging
from serve.repository import tree as repository
from serve.repository.source import Source
from tests.conftest import TINY_INPUTS, TINY_OUTPUTS, save_tiny


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny.onnx")


def stage(place: Path, onnx: Path, model: str = "tiny"):
    return staging.stage(place, model, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1))


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_stage_is_a_complete_repository_and_leaves_nothing(place: Path, onnx: Path) -> None:
    with stage(place, onnx) as staged:
        assert tree(staged.path) == ["tiny", "tiny/1", "tiny/1/model.onnx", "tiny/config.pbtxt"]
        assert staged.path.name.startswith(".")
        assert staged.path.parent == place.parent
        assert (staged.model, staged.number) == ("tiny", 1)
        written = (staged.path / "tiny" / "config.pbtxt").read_text()
        assert model_config.parse(written) == staged.config
    assert tree(place.parent) == ["tiny.onnx"]


def test_publish_twice(place: Path, publish_tiny) -> None:
    first = publish_tiny(place)
    before = (place / "tiny" / "config.pbtxt").read_text()
    second = publish_tiny(place)
    assert (first.number, second.number) == (1, 2)
    assert first.digest != second.digest  # the configuration names the version
    assert repository.numbers(place, "tiny") == [1, 2]
    assert repository.live(place, "tiny") == [2]
    assert repository.read_lineage(place, "tiny")["number"] == 2
    assert repository.read_lineage(place, "tiny", 1)["config"] == before
    assert second.path == place / "tiny" / "2"
    repository.verify(place)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_lineage_holds_what_serving_needs(place: Path, publish_tiny) -> None:
    publish_tiny(place)
    lineage = repository.read_lineage(place, "tiny")
    assert lineage["made_by"] == "a test"
    assert [TensorSpec.from_document(spec) for spec in lineage["inputs"]] == list(TINY_INPUTS)
    assert [TensorSpec.from_document(spec) for spec in lineage["outputs"]] == list(TINY_OUTPUTS)
    assert set(lineage["digests"]) == {"model.onnx", "config.pbtxt"}
    assert lineage["target"]["device"] == "cpu"


def test_external_data_is_taken_along_and_digested(place: Path, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "graph.onnx"
    model = onnx.load(save_tiny(tmp_path / "tiny.onnx"))
    onnx.save(model, path, save_as_external_data=True, location="graph.onnx.data", size_threshold=0)
    with stage(place, path) as staged:
        staging.publish(staged, {})
    assert set(repository.read_lineage(place, "tiny")["digests"]) == {"model.onnx", "model.onnx.data", "config.pbtxt"}
    onnx.checker.check_model(place / "tiny" / "1" / "model.onnx")


def test_external_data_outside_the_folder_is_refused(place: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(save_tiny(tmp_path / "tiny.onnx"))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret")
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BadRepository, match="secret"), stage(place, path):
        pass
    assert not place.exists()


@pytest.mark.parametrize("name", ["model.onnx", "../config.pbtxt"])
def test_changed_file_is_named(place: Path, publish_tiny, name: str) -> None:
    version = publish_tiny(place)
    path = (version.path / name).resolve()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BadRepository, match=f"{path.name}: changed") as failure:
        repository.verify(place)
    assert "lineage.json" in failure.value.fix


def test_the_page_of_the_proof_is_verified_and_does_not_change_what_is_served(place: Path, onnx: Path) -> None:
    with stage(place, onnx) as staged:
        wanted = repository.total(staged.digests)
        version = staging.publish(staged, {}, "<p>proof</p>")
    page = repository.page(version.path)
    assert page and page.read_text() == "<p>proof</p>"
    assert version.digest == wanted, "the page can name the version's digest"
    repository.verify(place)
    page.write_text("<p>another</p>")
    for verify in (
        lambda: repository.verify(place),
        lambda: repository.verify_version(place, "tiny", 1, repository.read_lineage(place, "tiny")),
    ):
        with pytest.raises(BadRepository, match=r"report.html: changed after it was published"):
            verify()
    page.unlink()
    with pytest.raises(BadRepository, match=r"report.html: is missing"):
        repository.verify(place)


def test_missing_file_is_named(place: Path, publish_tiny) -> None:
    (publish_tiny(place).path / "model.onnx").unlink()
    with pytest.raises(BadRepository, match=r"model\.onnx: is missing"):
        repository.verify(place)


def test_a_standard_repository_needs_no_lineage(place: Path, publish_tiny) -> None:
    (publish_tiny(place).path / "lineage.json").unlink()
    repository.verify(place)
    with pytest.raises(BadRepository, match="no lineage"):
        repository.read_lineage(place, "tiny")


@pytest.mark.parametrize("content", ["", "[]", '{"digests": 1}', "\x00"])
def test_broken_lineage(place: Path, publish_tiny, content: str) -> None:
    (publish_tiny(place).path / "lineage.json").write_text(content)
    with pytest.raises(BadRepository, match="not a lineage"):
        repository.verify(place)


def test_repository_that_is_a_file(place: Path, onnx: Path) -> None:
    place.write_text("")
    with pytest.raises(BadRepository, match="is a file"), stage(place, onnx):
        pass
    with pytest.raises(BadRepository, match="is a file"):
        repository.verify(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_repository(place: Path, onnx: Path) -> None:
    place.mkdir(mode=0o500)
    with pytest.raises(BadRepository, match="writable"), stage(place, onnx):
        pass


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", ".hidden", "a..b", "a b", "-x", "a\n"])
def test_model_name_that_cannot_be_a_folder(place: Path, onnx: Path, name: str) -> None:
    with pytest.raises(UsageError, match="model name"), stage(place, onnx, name):
        pass
    assert not place.exists()


def test_empty_or_absent_repository(place: Path) -> None:
    with pytest.raises(BadRepository, match="does not exist"):
        repository.models(place)
    place.mkdir()
    with pytest.raises(BadRepository, match="holds no model"):
        repository.models(place)
    (place / "stray").mkdir()
    with pytest.raises(BadRepository, match=r"stray: has no config\.pbtxt"):
        repository.models(place)


def test_two_commands_publish_the_same_number(place: Path, onnx: Path) -> None:
    with stage(place, onnx) as slow:
        with stage(place, onnx) as fast:
            staging.publish(fast, {"by": "fast"})
        with pytest.raises(BadRepository, match="meanwhile"):
            staging.publish(slow, {"by": "slow"})
    assert repository.read_lineage(place, "tiny")["by"] == "fast"
    repository.verify(place)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from modelathe import files
    from serve.repository import staging
    from tests.serve.repository.test_repository import stage

    place, onnx, hook = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    hooks = {"copy": (staging.onnx_file, "copy"), "sync": (files, "sync"), "move": (files, "move")}
    setattr(*hooks[hook], die)
    with stage(place, onnx) as staged:
        staging.publish(staged, {})
"""


@pytest.mark.parametrize("hook", ["copy", "sync", "move"])
def test_killed_publish_shows_the_server_nothing_new(place: Path, onnx: Path, publish_tiny, hook: str) -> None:
    publish_tiny(place)
    config = (place / "tiny" / "config.pbtxt").read_text()
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(place), str(onnx), hook]
    done = subprocess.run(command, cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (place / "tiny" / "config.pbtxt").read_text() == config
    assert repository.live(place, "tiny") == [1]
    assert repository.models(place) == ["tiny"]
    repository.verify(place)
    left = list(place.parent.glob(".*"))
    assert len(left) == 1
    os.utime(left[0], (0, 0))  # older than any command that has yet to take its lock
    again = publish_tiny(place)
    assert repository.live(place, "tiny") == [again.number]
    repository.verify(place)
    assert not list(place.parent.glob(".*"))


def test_a_staging_folder_in_use_is_not_swept(place: Path, onnx: Path, publish_tiny) -> None:
    with stage(place, onnx) as staged:
        os.utime(staged.path, (0, 0))
        publish_tiny(place, model="other")
        assert (staged.folder / "model.onnx").exists()


def test_first_publish_that_fails_leaves_no_model(place: Path, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="No space"), stage(place, onnx) as staged:
        staging.publish(staged, {})
    assert tree(place.parent) == ["tiny.onnx"]


def test_lineage_is_plain_json(place: Path, publish_tiny) -> None:
    document = json.loads((publish_tiny(place).path / "lineage.json").read_text())
    assert list(document)[:3] == ["made_by", "model", "number"]
