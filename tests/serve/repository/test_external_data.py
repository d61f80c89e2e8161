"""External data: wherever a graph states them, they are taken along, under names that no server takes for a library."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelathe.tensors import BATCH, TensorSpec
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import lint, onnx_file, staging
from serve.repository import tree as repository
from serve.repository.source import Source
from serve.rollout import rollout
from serve.server.tritonserver import running
from tests.conftest import TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny
from tests.serve.commands.test_up import serve

LIBRARY = "libtriton_onnxruntime.so"
HERE = TensorSpec("x", "float32", (BATCH, 4))


def outside(tensor: TensorProto, location: str, folder: Path) -> None:
    """Move a tensor's values into a file."""
    path = folder / location
    path.parent.mkdir(parents=True, exist_ok=True)
    offset = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(tensor.raw_data)
    entries = {"location": location, "offset": str(offset), "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def weight(name: str, value: float) -> TensorProto:
    return numpy_helper.from_array(np.full((1, 4), value, np.float32), name)


def branches(folder: Path) -> Path:
    """Write y = x · 2 + 1 if x[0, 0] > 0, else x · 2 + 5, as a function, a constant and the branches of an If."""
    free = ["batch", 4]
    value = helper.make_tensor_value_info
    graphs = []
    for name, number, location in (("then", 1.0, "one.bin"), ("else", 5.0, "deep/two.bin")):
        inner = weight(f"w_{name}", number)
        outside(inner, location, folder)
        node = helper.make_node("Add", ["twice", f"w_{name}"], [f"y_{name}"])
        graphs.append(helper.make_graph([node], name, [], [value(f"y_{name}", TensorProto.FLOAT, free)], [inner]))
    constant = weight("", 2.0)
    outside(constant, LIBRARY, folder)
    opset = helper.make_opsetid("", 20)
    double = helper.make_function(
        "ours",
        "Double",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["two"], value=constant),
            helper.make_node("Mul", ["a", "two"], ["b"]),
        ],
        [opset],
    )
    nodes = [
        helper.make_node("Double", ["x"], ["twice"], domain="ours"),
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=graphs[0], else_branch=graphs[1]),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [value("x", TensorProto.FLOAT, free)],
        [value("y", TensorProto.FLOAT, free)],
        [numpy_helper.from_array(np.float32(0), "zero")],
    )
    model = helper.make_model(
        graph, opset_imports=[opset, helper.make_opsetid("ours", 1)], ir_version=10, functions=[double]
    )
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def publish(place: Path, path: Path) -> staging.Version:
    with staging.stage(
        place, "m", Source(path, (HERE,), (TensorSpec("y", "float32", (BATCH, 4)),)), Target(cores=1)
    ) as staged:
        return staging.publish(staged, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_data_of_branches_functions_and_attributes_get_names_of_ours(tmp_path: Path) -> None:
    import onnxruntime

    (tmp_path / "here").mkdir()
    path = branches(tmp_path / "here")
    assert sorted(onnx_file.external(path)) == sorted(["one.bin", "deep/two.bin", LIBRARY])
    version = publish(tmp_path / "repository", path)
    data = ["model.onnx.data", "model.onnx.data.1", "model.onnx.data.2"]
    assert names(version.path) == ["lineage.json", "model.onnx", *data]
    assert set(repository.read_lineage(tmp_path / "repository", "m")["digests"]) == {
        "config.pbtxt",
        "model.onnx",
        *data,
    }
    session = onnxruntime.InferenceSession(version.path / "model.onnx")
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], 2 * x + 1)
    np.testing.assert_array_equal(session.run(None, {"x": -x})[0], -2 * x + 5)
    again = publish(tmp_path / "repository", version.path / "model.onnx")
    assert (again.path / "model.onnx").read_bytes() == (version.path / "model.onnx").read_bytes()


def save_outside(folder: Path, location: str) -> Path:
    """Write the tiny model with its weight in the file `location`, which need not be one."""
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.load(save_tiny(folder / "graph.onnx"))
    tensor = model.graph.initializer[0]
    outside(tensor, "weight.bin", folder)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    (folder / "graph.onnx").write_bytes(model.SerializeToString())
    return folder / "graph.onnx"


@pytest.mark.parametrize("location", ["../weight.bin", "{absolute}", "out.bin", "linked/weight.bin", "a/../../x", ""])
def test_data_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    here = tmp_path / "here"
    path = save_outside(here, location.format(absolute=here / "weight.bin"))
    (tmp_path / "weight.bin").write_bytes((here / "weight.bin").read_bytes())
    (here / "a").mkdir()
    (here / "out.bin").symlink_to("../weight.bin")
    (here / "linked").symlink_to(tmp_path)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(BadRepository, match="is not a file beside it"):
        publish(tmp_path / "repository", path)
    assert not (tmp_path / "repository").exists()


def in_a_cache(tmp_path: Path) -> Path:
    """As a cache of models has it: every name is a link to a file that is called by its digest."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "onnx"
    snapshot.mkdir(parents=True)
    save_outside(tmp_path / "made", "weight.bin").parent.rename(blobs)
    for name in ("graph.onnx", "weight.bin"):
        (blobs / name).rename(blobs / f"digest-of-{name}")
        (snapshot / name).symlink_to(Path("../../../blobs") / f"digest-of-{name}")
    return snapshot / "graph.onnx"


def beside(tmp_path: Path) -> Path:
    path = save_outside(tmp_path / "made", "link.bin")
    (path.parent / "link.bin").symlink_to("weight.bin")
    return path


def through_a_linked_folder(tmp_path: Path) -> Path:
    save_outside(tmp_path / "made", "weight.bin")
    (tmp_path / "linked").symlink_to("made")
    return tmp_path / "linked" / "graph.onnx"


def up_and_down(tmp_path: Path) -> Path:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    return save_outside(tmp_path / "made", "deep/../weight.bin")


@pytest.mark.parametrize("place", [in_a_cache, beside, through_a_linked_folder, up_and_down])
def test_data_behind_links_in_the_models_own_folders(place: Callable[[Path], Path], tmp_path: Path) -> None:
    publish(tmp_path / "repository", place(tmp_path))
    published = tmp_path / "repository" / "m" / "1"
    assert names(published) == ["lineage.json", "model.onnx", "model.onnx.data"]
    assert not any(path.is_symlink() for path in published.iterdir())
    weight = onnx.load(published / "model.onnx").graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(weight), TINY_WEIGHT)


def test_a_library_among_the_data_is_not_run(tmp_path: Path, server_prefix: Path) -> None:
    """Called like Triton's own backend, it was loaded instead of that one."""
    path = save_outside(tmp_path / "here", LIBRARY)
    (tmp_path / "here" / "weight.bin").rename(tmp_path / "here" / LIBRARY)
    place = tmp_path / "repository"
    added = serve("add", str(path), "--name", "m", "--repository", str(place))
    assert added.returncode == 0, added.stderr
    assert names(place / "m" / "1") == ["lineage.json", "model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("name", [f"1/{LIBRARY}", "1/deep/more.bin", "1/link", LIBRARY])
def test_one_more_file_is_refused_with_its_name(tmp_path: Path, name: str, server_prefix: Path) -> None:
    place = tmp_path / "repository"
    with staging.stage(
        place, "m", Source(save_tiny(tmp_path / "tiny.onnx"), TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)
    ) as staged:
        staging.publish(staged, {})
    more = place / "m" / name
    more.parent.mkdir(exist_ok=True)
    if more.name == "link":
        more.symlink_to("model.onnx")
    else:
        more.write_bytes(b"what is it?")
    with pytest.raises(BadRepository, match="was not published") as raised, running(place):
        pass
    assert raised.value.where == str(more)
    with pytest.raises(BadRepository, match="was not published"):
        rollout.promote(place, "m", 1)
    assert [(finding.where, finding.level) for finding in lint.check(place)] == [(str(more), "error")]
