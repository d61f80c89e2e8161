"""Image pipelines around models of many kinds: colour, layout, dtype, and what their scores are."""

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelathe.client import connect
from modelathe.tensors import BATCH, TensorSpec
from serve.config.errors import ModelRefused
from serve.config.target import Target
from serve.pipelines import publish as publishing
from serve.pipelines.image import image
from serve.pipelines.publish import called
from serve.repository import staging
from serve.repository.source import Source
from serve.server.endpoint import Endpoint
from serve.server.install import environment
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save
from tests.serve.commands.test_up import serve
from tests.serve.pipelines.test_pipelines import draw, images

HEIGHT, WIDTH = 4, 6
# By model: the dtype of its pixels, where the channels are, its last operators.
MODELS = {
    "planes": ("float32", "CHW", ()),
    "points": ("float32", "HWC", ()),
    "bytes": ("uint8", "CHW", ()),
    "byte_points": ("uint8", "HWC", ()),
    "halves": ("float16", "CHW", ()),
    "certain": ("float32", "CHW", ("Softmax",)),
    "several": ("float32", "HWC", ("Sigmoid", "Identity")),
    "hidden": ("float32", "CHW", ("Softmax", "Neg", "Neg")),
}


def publish(place: Path, onnx: Path, model: str) -> None:
    """Publish a model of colour images with a class for each column of each channel: the mean over the height."""
    from onnx import TensorProto as T

    dtype, layout, last = MODELS[model]
    dims = [3, HEIGHT, WIDTH] if layout == "CHW" else [HEIGHT, WIDTH, 3]
    nodes = [
        ("Cast", ["x"], ["floats"], {"to": T.FLOAT}),
        ("ReduceMean", ["floats", "height"], ["mean"], {"keepdims": 0}),
        ("Flatten", ["mean"], ["flat"]),
        ("Mul", ["flat", "steep"], ["0"]),
        *((kind, [f"{number}"], [f"{number + 1}"]) for number, kind in enumerate(last)),
        ("Identity", [f"{len(last)}"], ["y"]),
    ]
    steep = 4 / 255 if dtype == "uint8" else 4
    weights = [("height", np.array([dims.index(HEIGHT) + 1])), ("steep", np.full(1, steep, np.float32))]
    tensors = [("x", T.DataType.Value(T_NAMES[dtype]), ["batch", *dims])], [("y", T.FLOAT, ["batch", 3 * WIDTH])]
    save(onnx, nodes, *tensors, weights)
    specs = (TensorSpec("x", dtype, (BATCH, *dims), (0, 1)),), (TensorSpec("y", "float32", (BATCH, 3 * WIDTH)),)
    with staging.stage(place, model, Source(onnx, *specs), Target(cores=1)) as staged:
        staging.publish(staged, {})


T_NAMES = {"float32": "FLOAT", "uint8": "UINT8", "float16": "FLOAT16"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> Iterator[Endpoint]:
    here = tmp_path_factory.mktemp("images")
    place = here / "model_repository"
    for model in MODELS:
        publish(place, here / "model.onnx", model)
        image(called(place, model), check=False)
    done = serve(
        "pipeline", "image", "hidden", "--scores", "probabilities", "--name", "told", "--repository", str(place)
    )
    assert done.returncode == 0, done.stderr
    with running(place, grace=0) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, server_prefix: Path) -> dict[tuple[int, int], bytes]:
    """PNG files, black but for one column of one channel, by channel and column; larger than the model's images."""
    drawn = {}
    for channel, column in ((0, 0), (1, 5), (2, 3)):
        pixels = np.zeros((8 * HEIGHT, 8 * WIDTH, 3), np.uint8)
        pixels[:, 8 * column : 8 * column + 8, channel] = 255
        drawn[f"{channel}{column}.png"] = pixels
    made = draw(environment(), tmp_path_factory.mktemp("files"), **drawn)
    return {(int(name[0]), int(name[1])): data for name, data in made.items()}


@pytest.mark.parametrize("model", MODELS)
def test_a_pixel_arrives_where_the_model_expects_it(
    lab: Endpoint, files: dict[tuple[int, int], bytes], model: str
) -> None:
    dtype, layout, last = MODELS[model]
    with connect(lab.grpc) as client:
        answer = client.infer(f"{model}_image", images(*files.values()))
        pixels = client.infer(f"{model}_decoder", images(*files.values()))["pixels"]
        direct = client.infer(model, {"x": pixels})["y"].astype(np.float64)
    assert pixels.dtype == dtype
    wanted = [column * 3 + channel if layout == "HWC" else channel * WIDTH + column for channel, column in files]
    assert [int(label) for label in answer["label"].ravel()] == wanted
    raised = np.exp(direct)
    probable = direct if last and model != "hidden" else raised / raised.sum(1, keepdims=True)
    np.testing.assert_allclose(answer["score"][:, 0], probable.max(1), atol=1e-5)


def test_who_calls_it_may_say_what_the_scores_are(lab: Endpoint, files: dict[tuple[int, int], bytes]) -> None:
    with connect(lab.grpc) as client:
        told = client.infer("told", images(*files.values()))["score"]
        known = client.infer("certain_image", images(*files.values()))["score"]
    np.testing.assert_allclose(told, known, atol=1e-6)


@pytest.mark.parametrize("options", [("--mean", "0.5"), ("--std", "0.2,0.2,0.2"), ("--scale", "255")])
def test_bytes_are_not_normalized(tmp_path: Path, options: tuple[str, str]) -> None:
    publish(tmp_path / "model_repository", tmp_path / "model.onnx", "bytes")
    done = serve(
        "pipeline", "image", "bytes", *options, "--no-check", "--repository", str(tmp_path / "model_repository")
    )
    assert (done.returncode, "the model takes uint8" in done.stderr) == (2, True)


def test_other_integers_are_refused(tmp_path: Path) -> None:
    from onnx import TensorProto as T

    place, dims = tmp_path / "model_repository", ["batch", 3, 4, 6]
    nodes = [("Cast", ["x"], ["floats"], {"to": T.FLOAT}), ("Flatten", ["floats"], ["y"])]
    onnx = save(tmp_path / "model.onnx", nodes, [("x", T.INT32, dims)], [("y", T.FLOAT, ["batch", 72])])
    specs = (TensorSpec("x", "int32", (BATCH, 3, 4, 6)),), (TensorSpec("y", "float32", (BATCH, 72)),)
    with staging.stage(place, "whole", Source(onnx, *specs), Target(cores=1)) as staged:
        staging.publish(staged, {})
    done = serve("pipeline", "image", "whole", "--repository", str(place))
    assert (done.returncode, "its inputs are not one image: x: int32" in done.stderr) == (4, True), done.stderr


def content(place: Path) -> dict[str, bytes]:
    """Every file, and every empty folder, below the folder in which the repository is, but for the numbers given."""
    found = sorted(set(place.parent.rglob("*")) - {place / ".numbers.json"})
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in found}


def test_a_part_that_fails_its_dry_load_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, server_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model_repository"
    publish(place, tmp_path / "model.onnx", "planes")
    before = content(place)

    def broken(model: str, *shared: str) -> dict[str, Path]:
        found = files(model, *shared)
        return {"model.py": found["model.py"]} if model == "label" else found

    files = publishing.files
    monkeypatch.setattr(publishing, "files", broken)
    # A server that fails leaves its log among the temporary files.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("logs")))
    with pytest.raises(ModelRefused, match="No module named 'step'"):
        image(called(place, "planes"))
    assert content(place) == before


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("there", [(), ("planes_decoder",), ("planes_decoder", "planes_label", "planes_image")])
def test_a_part_that_cannot_be_published_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: Sequence[str], renamed: bool
) -> None:
    place = tmp_path / "model_repository"
    publish(place, tmp_path / "model.onnx", "planes")
    image(called(place, "planes"), check=False)
    for gone in {"planes_decoder", "planes_label", "planes_image"} - set(there):
        shutil.rmtree(place / gone)
    before = content(place)

    def fails_last(staged: staging.Staged, *arguments: Any, **options: Any) -> staging.Version:
        if staged.model == "planes_image" and not renamed:
            raise OSError(errno.ENOSPC, "the disk is full")
        version = real(staged, *arguments, **options)
        if staged.model == "planes_image":
            raise KeyboardInterrupt
        return version

    real = staging.publish
    monkeypatch.setattr(staging, "publish", fails_last)
    with pytest.raises(KeyboardInterrupt if renamed else OSError):
        image(called(place, "planes"), check=False)
    assert content(place) == before
