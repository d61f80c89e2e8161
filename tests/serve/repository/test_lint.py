"""Lint: each fault that a repository can have, found without a server, named with its place and the way out."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from serve.config.errors import BadRepository
from serve.repository import lint, staging
from serve.repository import tree as repository
from tests.conftest import TINY, save_tiny
from tests.serve.commands.test_up import serve


@pytest.fixture
def place(tmp_path: Path, publish_tiny: Callable[..., staging.Version]) -> Path:
    place = tmp_path / "model_repository"
    publish_tiny(place)
    return place


def config(place: Path) -> Path:
    return place / TINY / "config.pbtxt"


def replace(place: Path, old: str, new: str) -> None:
    """Change the configuration, and forget the digests, as one who writes by hand does."""
    path = config(place)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    (place / TINY / "1" / "lineage.json").unlink()


def append(place: Path, text: str) -> None:
    """Add to the configuration; a scheduler takes the place of the one that is there."""
    there = config(place).read_text()
    if text.startswith("dynamic_batching"):
        there = there.replace("dynamic_batching {\n}\n", "")
    config(place).write_text(f"{there}\n{text}\n")
    (place / TINY / "1" / "lineage.json").unlink()


def found(place: Path, **options: str) -> list[tuple[str, str]]:
    return [(finding.level, finding.what) for finding in lint.check(place, **options)]


def test_nothing_is_wrong_with_what_we_publish(place: Path) -> None:
    assert found(place) == []
    assert found(Path("model_repository")) == []


CHANGES = {
    "another model's": ('name: "tiny"\nversion', 'name: "other"\nversion', "is the configuration of other"),
    "input name": ('name: "x"', 'name: "z"', "config.pbtxt has the input z, the model has x"),
    "dtype": (
        "TYPE_FP32\n  dims: 4",
        "TYPE_INT64\n  dims: 4",
        "the input x is TYPE_INT64 in config.pbtxt and TYPE_FP32",
    ),
    "dims": ("dims: 3", "dims: 5", r"the output y has the shape [-1, 5] by config.pbtxt and [-1, 3] in the model"),
    "batch axis": (
        *("max_batch_size: 32", "max_batch_size: 0"),
        "the input x has the shape [4] by config.pbtxt and [-1, 4] in the model",
    ),
    "version": ("versions: 1", "versions: 3", "names version 3, which is not there"),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_wrong_configuration(place: Path, fault: str) -> None:
    old, new, says = CHANGES[fault]
    replace(place, old, new)
    errors = [what for level, what in found(place) if level == "error"]
    assert errors
    assert says in errors[0]


@pytest.mark.parametrize(
    ("text", "level", "says"),
    [
        ("nonsense {", "error", "not a Triton model configuration"),
        ("batch_input [ { kind: BATCH_ELEMENT_COUNT } ]", "error", "batch_input and batch_output are not supported"),
        ("instance_group [ { count: 1 kind: KIND_GPU } ]", "warning", "asks for a GPU, and this machine has none"),
        ("instance_group [ { count: 64 kind: KIND_CPU } ]", "warning", "65 instances with 1 threads each share"),
        (
            'parameters { key: "intra_op_thread_count" value { string_value: "all" } }',
            *("error", "the parameter intra_op_thread_count is 'all', no number"),
        ),
        ("dynamic_batching { preferred_batch_size: 64 }", "error", "preferred_batch_size 64 is above max_batch_size"),
        ("dynamic_batching { default_queue_policy { max_queue_size: 9 } }", "warning", "half a second at most"),
    ],
)
def test_what_a_configuration_asks_for(place: Path, text: str, level: str, says: str) -> None:
    append(place, text)
    assert any(level == of and says in what for of, what in found(place)), found(place)


def test_a_gpu_in_a_configuration_for_a_cpu(place: Path) -> None:
    config(place).write_text(config(place).read_text().replace("KIND_CPU", "KIND_GPU"))
    assert ("error", "asks for a GPU, and the target is a CPU") in found(place)


def test_files(place: Path, tmp_path: Path) -> None:
    version = place / TINY / "1"
    (version / "model.onnx").rename(tmp_path / "kept.onnx")
    assert found(place) == [("error", "has no model.onnx: half copied?")]
    (version / "lineage.json").unlink()
    (version / "model.onnx").write_bytes(b"\x08no graph at all")
    assert found(place) == [("error", "is not an ONNX file")]
    (version / "model.onnx").unlink()
    (version / "model.onnx").symlink_to(tmp_path / "kept.onnx")
    level, what = found(place)[0]
    assert (level, what) == ("warning", f"is a link out of the repository, to {tmp_path / 'kept.onnx'}")


def test_a_half_copied_version_that_does_not_serve_is_a_warning(place: Path) -> None:
    (place / TINY / "2").mkdir()
    (place / TINY / "new").mkdir()
    assert sorted(found(place)) == [
        ("warning", "has no model.onnx: half copied?"),
        ("warning", "is no version: Triton passes it over"),
    ]


def test_what_only_looks_like_a_version(place: Path) -> None:
    shutil.copytree(place / TINY / "1", place / TINY / "02")
    (place / TINY / "3").write_text("a file")
    (place / TINY / "loop").symlink_to("loop")
    assert found(place) == [("warning", "is no version: Triton passes it over")]
    assert repository.numbers(place, TINY) == [1]


def test_external_data_that_is_missing(place: Path, tmp_path: Path) -> None:
    import onnx

    version = place / TINY / "1"
    (version / "lineage.json").unlink()
    model = onnx.load(version / "model.onnx")
    onnx.save(model, version / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    assert found(place) == []
    (version / "weights.data").unlink()
    assert found(place) == [("error", "its external data 'weights.data' is not a file beside it")]


def test_names_that_no_model_can_have(place: Path) -> None:
    shutil.copytree(place / TINY, place / "a..b")
    assert any("'a..b' cannot be a folder" in what for _, what in found(place, model="a..b"))
    with pytest.raises(BadRepository, match="holds no model nope"):
        lint.check(place, "nope")


def test_a_free_dim_defeats_batching_unless_clients_pad(tmp_path: Path) -> None:
    import onnx

    free = save_tiny(tmp_path / "tiny.onnx", np.ones((1, 3), np.float32))
    model = onnx.load(free)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.save(model, free)
    add = ("add", str(free), "--name", "free", "--dim", "tokens=1,1,9", "--no-check")
    for buckets, expected in (((), 1), (("--set", "buckets={tokens = [4, 9]}"), 0)):
        at = tmp_path / str(len(buckets))
        assert serve(*add, "--repository", str(at), *buckets).returncode == 0
        whats = found(at)
        assert len(whats) == expected
        assert all("requests whose x differ in size are not batched together" in what for _, what in whats)


def engine(place: Path, version: tuple[int, int, int, int]) -> Path:
    """A file with the head of an engine, and a configuration for it."""
    home = place / "engine"
    (home / "1").mkdir(parents=True)
    (home / "1" / "model.plan").write_bytes(b"ftrt" + bytes(20) + struct.pack("4B", *version) + bytes(64))
    text = config(place).read_text().replace('name: "tiny"', 'name: "engine"').replace("onnxruntime", "tensorrt")
    (home / "config.pbtxt").write_text(f'{text}\ndefault_model_filename: "model.plan"\n')
    return home


def test_an_engine_of_another_tensorrt(place: Path) -> None:
    engine(place, (10, 13, 3, 9))
    assert found(place, model="engine", image="26.02") == []
    other = found(place, model="engine", image="26.07")
    assert other == [("error", "was built by TensorRT 10.13.3.9, and Triton 26.07 has 10.14.1.48")]
    assert found(place, model="engine", image="99.01") == [("warning", "which TensorRT is in 99.01 is not known")]
    assert found(place, model="engine") == [("warning", "is a TensorRT engine, which only NVIDIA's image serves")]


def test_an_accelerator_that_only_our_server_knows(place: Path) -> None:
    made = config(place)
    text = made.read_text() + 'optimization { execution_accelerators { gpu_execution_accelerator { name: "%s" } } }'
    (lineage := place / TINY / "1" / "lineage.json").unlink()
    made.write_text(text % "tensorrt-rtx")
    assert not lineage.exists() and found(place) == []
    (error,) = found(place, image="26.07")
    assert error[1].startswith("asks for the accelerator tensorrt-rtx, which NVIDIA's image refuses")
    made.write_text(text % "tensorrt")
    assert found(place, image="26.07") == []


def test_a_model_whose_backend_nothing_says(place: Path) -> None:
    replace(place, 'backend: "onnxruntime"', "")
    assert found(place) == []  # by the name of its file
    (place / TINY / "1" / "model.onnx").rename(place / TINY / "1" / "weights.bin")
    assert [(level, "states no backend" in what) for level, what in found(place)] == [("warning", True)]


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        ("onnxrt", "asks for the backend onnxrt, which our server does not have"),
        ("python", "is Python of others"),
    ],
)
def test_a_model_that_is_not_tried_is_not_praised(place: Path, backend: str, says: str) -> None:
    replace(place, 'backend: "onnxruntime"', f'backend: "{backend}"')
    (place / TINY / "1" / "model.py").touch()
    assert [(level, says in what) for level, what in found(place)] == [("warning", True)]


def test_a_model_without_a_configuration(place: Path) -> None:
    config(place).unlink()
    (place / TINY / "1" / "lineage.json").unlink()
    assert [level for level, _ in found(place)] == ["warning"]


def test_the_command_says_one_line_for_each_and_ends_with_4(place: Path, server_prefix: Path) -> None:
    fine = serve("check", "--repository", str(place))
    assert (fine.returncode, fine.stdout) == (0, "nothing is wrong\n"), fine.stderr
    replace(place, 'name: "x"', 'name: "z"')
    (place / TINY / "stray").mkdir()
    said = serve("check", "--repository", str(place))
    assert said.returncode == 4
    lines = said.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["warning", "error"]
    assert all("; fix: " in line for line in lines)
    document = json.loads(serve("check", "--repository", str(place), "--json").stdout)
    assert [set(entry) for entry in document["findings"]] == [{"model", "where", "what", "fix", "level"}] * 2
    assert document["error"]["exit"] == 4
    assert serve("check", "--repository", str(place), "--image", "latest").returncode == 2


def test_the_server_is_asked_where_the_files_are_in_order(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    import onnx

    path = place / TINY / "1" / "model.onnx"
    (path.parent / "lineage.json").unlink()
    # Valid, and of the right names, types and dims; but no runtime has this operator.
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    assert found(place) == []
    assert serve("check", "--repository", str(place), "--no-load").returncode == 0
    (tmp_path / "tmp").mkdir()
    said = serve("check", "--repository", str(place), env={"TMPDIR": str(tmp_path / "tmp")})
    assert said.returncode == 4, said
    assert list((tmp_path / "tmp").iterdir()) == []
    assert "NoSuchOperator" in said.stdout
    assert "fix: export the model again" in said.stdout
