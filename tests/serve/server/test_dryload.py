"""Dry load: what a throw-away server finds wrong with a version."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modelathe.tensors import BATCH, TensorSpec
from serve.config.errors import BadRepository, ModelRefused
from serve.config.settings import Settings
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from serve.server import dryload
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, save_tiny


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


@pytest.fixture
def staged(place: Path, tmp_path: Path) -> Iterator[staging.Staged]:
    onnx = save_tiny(tmp_path / "tiny.onnx")
    with staging.stage(place, TINY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        yield staged


def test_dry_load(staged: staging.Staged, server_prefix: Path) -> None:
    dryload.staged(staged)


def test_dry_load_refuses_what_is_not_finite(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    onnx = save_tiny(tmp_path / "tiny.onnx", np.full((4, 3), np.inf, np.float32))
    with staging.stage(place, TINY, Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        with pytest.raises(BadRepository, match="the answers hold NaN or infinity in y") as caught:
            dryload.staged(staged)
        assert "say --allow-nonfinite" in caught.value.fix
        dryload.staged(staged, nonfinite=True)
        (finding,) = dryload.findings(staged.path, TINY)
        assert (finding.level, finding.what) == ("warning", "the answers hold NaN or infinity in y")


@pytest.fixture
def wide(tmp_path: Path) -> tuple[Path, tuple[TensorSpec, ...]]:
    """A model and its input, so large that among random bytes there is a NaN."""
    onnx = save_tiny(tmp_path / "wide.onnx", np.ones((2000, 3), np.float32))
    return onnx, (TensorSpec("x", "float32", (BATCH, 2000)),)


def test_a_model_that_refuses_nan_is_warmed_up_without(place: Path, wide, server_prefix: Path) -> None:
    refuses = Settings(nonfinite="refuse")
    with staging.stage(place, TINY, Source(*wide, TINY_OUTPUTS), Target(cores=1), refuses) as staged:
        dryload.staged(staged)


@pytest.mark.parametrize("name", ["modelathe.nonfinite", "lathe.nonfinite"])  # the second is that of 0.1
def test_a_refused_warm_up_is_told_as_one(place: Path, wide, server_prefix: Path, name: str) -> None:
    with staging.stage(place, TINY, Source(*wide, TINY_OUTPUTS), Target(cores=1)) as staged:
        with (staged.path / TINY / "config.pbtxt").open("a") as config:
            config.write(f'parameters {{ key: "{name}" value {{ string_value: "refuse" }} }}')
        # Whether the server survives it is a matter of luck.
        with pytest.raises(ModelRefused, match="the input x holds NaN or infinity") as raised:
            dryload.staged(staged)
        assert "model_warmup" in raised.value.fix


def test_shapes_of_a_warm_up_are_told_with_the_fix(staged: staging.Staged, server_prefix: Path) -> None:
    config = staged.path / TINY / "config.pbtxt"
    head, warm_up, tail = config.read_text().partition("model_warmup")
    config.write_text(head + warm_up + tail.replace("dims: 4", "dims: 5"))
    (finding,) = dryload.findings(staged.path, TINY)
    assert finding.what.endswith("Expected [-1,4], got [1,5].")
    assert finding.fix == "correct the dims of the input in config.pbtxt, or those in its model_warmup"


def test_a_pipeline_of_larger_batches_than_its_model_takes(staged: staging.Staged, server_prefix: Path) -> None:
    home = staged.path / "whole"
    (home / "1").mkdir(parents=True)
    tensors = "\n".join(
        f'{kind} {{ name: "{name}" data_type: TYPE_FP32 dims: [{size}] }}'
        for kind, name, size in (("input", "x", 4), ("output", "y", 3))
    )
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    step = f'ensemble_scheduling {{ step [{{ model_name: "{TINY}" model_version: -1 {maps} }}] }}'

    def found(largest: int) -> list[str]:
        (home / "config.pbtxt").write_text(f'platform: "ensemble" max_batch_size: {largest} {tensors} {step}')
        return [finding.fix for finding in dryload.findings(staged.path, "whole")]

    assert found(64) == ["lower its max_batch_size to the least of the models that it calls"]
    assert found(32) == []  # it has no name of its own, and that of its folder is asked


def test_dry_load_refuses_a_corrupt_model(staged: staging.Staged, server_prefix: Path) -> None:
    (staged.folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        dryload.staged(staged)


def test_dry_load_refuses_a_frozen_batch_axis(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    import onnx

    model = onnx.load(save_tiny(tmp_path / "tiny.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "frozen.onnx")
    with (
        staging.stage(
            place, TINY, Source(tmp_path / "frozen.onnx", TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)
        ) as staged,
        pytest.raises(ModelRefused, match=r"shape \[-1, 4\] by config.pbtxt and \[1, 4\] in the model"),
    ):
        dryload.staged(staged)


def test_wrong_shape_of_an_answer_is_named(staged: staging.Staged) -> None:
    spec = TensorSpec("y", "float32", (BATCH, 3))
    dryload._check_answer(TINY, spec, {"y": np.zeros((8, 3), np.float32)}, 8)
    for wrong in (np.zeros((8, 4)), np.zeros((1, 3)), np.zeros(8)):
        with pytest.raises(BadRepository, match="the served shape"):
            dryload._check_answer(TINY, spec, {"y": wrong}, 8)
    with pytest.raises(BadRepository, match="does not answer"):
        dryload._check_answer(TINY, spec, {}, 8)
