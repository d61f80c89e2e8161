"""`serve add` and `serve show`: a file, a bundle or a version becomes the next version, with settings."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelathe.client import connect
from modelathe.errors import UsageError
from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import onnx_file, source, staging
from serve.repository import tree as repository
from serve.rollout import rollout
from serve.server.tritonserver import running
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, TINY_WEIGHT, save_tiny
from tests.serve.commands.test_up import serve

TOKENS = Dim("tokens", 1, 8, 64)


@pytest.fixture
def place(tmp_path: Path, publish_tiny: Callable[..., staging.Version]) -> Path:
    place = tmp_path / "model_repository"
    publish_tiny(place)
    return place


def free(path: Path, name: str = "tokens") -> Path:
    """The tiny model with a second dim that changes size."""
    import onnx

    model = onnx.load(save_tiny(path, np.ones((1, 3), np.float32)))
    dim = model.graph.input[0].type.tensor_type.shape.dim[1]
    dim.dim_param = name
    onnx.save(model, path)
    return path


def test_a_file_is_added_checked_and_waits_for_its_promotion(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    onnx = save_tiny(tmp_path / "twice.onnx", 2 * TINY_WEIGHT)
    before = (place / TINY / "config.pbtxt").read_bytes()
    at = ("--repository", str(place))
    done = serve("add", str(onnx), "--name", TINY, *at, "--cores", "1", "--set", "queue_delay_us=300")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"staged: {TINY} version 2\n  serve promote {TINY} 2 --repository {place}\n"
    assert (place / TINY / "config.pbtxt").read_bytes() == before
    assert [standing.state for standing in rollout.standings(place, TINY)] == ["live", "staged"]
    shown = serve("show", TINY, "2", *at).stdout
    assert "batching       up to 32, a request waits up to 300 µs for others\n" in shown
    assert "up to 32, of what waits already\n" in serve("show", TINY, *at).stdout
    rollout.promote(place, TINY, 2)
    assert "300 µs" in serve("show", TINY, *at).stdout
    assert f"  source: {onnx} ({repository.digest(onnx)[:12]})\n" in serve("why", TINY, *at).stdout
    served = json.loads(serve("show", TINY, *at, "--json").stdout)["config"]
    assert served["dynamic_batching"]["max_queue_delay_microseconds"] == "300"
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        x = np.ones((2, 4), np.float32)
        np.testing.assert_allclose(client.infer(TINY, {"x": x})["y"], x @ (2 * TINY_WEIGHT), rtol=1e-6)


def turned(path: Path, kind: int) -> Path:
    """Write y = x · w in float16, between transposes; x and y of another type are cast."""
    nodes = [
        *([helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16)] if kind != TensorProto.FLOAT16 else []),
        helper.make_node("Transpose", ["half" if kind != TensorProto.FLOAT16 else "x"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["turned", "w"], ["product"]),
        helper.make_node("Transpose", ["product"], ["back"], perm=[1, 0, 2]),
        helper.make_node("Cast", ["back"], ["y"], to=kind),
    ]
    x, y = (helper.make_tensor_value_info(name, kind, ["batch", 5, 16]) for name in "xy")
    weight = numpy_helper.from_array(np.full((16, 16), 0.5, np.float16), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def looked_up(path: Path) -> Path:
    """Write y = table[ids] · w in float16 between transposes, with no Cast to float16 in it."""
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["turned", "w"], ["product"]),
        helper.make_node("Transpose", ["product"], ["back"], perm=[1, 0, 2]),
        helper.make_node("Cast", ["back"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5, 16])
    weights = {"table": np.ones((9, 16), np.float16), "w": np.full((16, 16), 0.5, np.float16)}
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.mark.parametrize(("kept", "other"), [("then_branch", "else_branch"), ("else_branch", "then_branch")])
def test_a_branch_in_float16_is_found(kept: str, other: str, tmp_path: Path) -> None:
    def branch(kind: int) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"out{kind}", kind, None)
        return helper.make_graph([helper.make_node("Cast", ["x"], [f"out{kind}"], to=kind)], "b", [], [out])

    parts = {kept: branch(TensorProto.FLOAT16), other: branch(TensorProto.DOUBLE)}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    node = helper.make_node("If", ["c"], ["y"], **parts)
    c, y = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in "cy")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [c, x], [y])), tmp_path / "if.onnx")
    assert onnx_file.in_float16(tmp_path / "if.onnx")


def test_a_model_in_float16_is_served(tmp_path: Path, server_prefix: Path) -> None:
    """ONNX Runtime's optimizer ends the process at a Transpose before a product in float16 (its issue 28392)."""
    place = tmp_path / "repository"
    for name, kind in (("float", TensorProto.FLOAT), ("half", TensorProto.FLOAT16)):
        file = str(turned(tmp_path / f"{name}.onnx", kind))
        done = serve("add", file, "--name", name, "--repository", str(place))
        assert done.returncode == 0, done.stderr
    file = str(looked_up(tmp_path / "table.onnx"))
    assert serve("add", file, "--name", "table", "--repository", str(place)).returncode == 0
    turned(place / "bare" / "1" / "model.onnx", TensorProto.FLOAT)
    with running(place, grace=0) as endpoint, connect(endpoint.grpc) as client:
        for name, dtype in (("float", np.float32), ("half", np.float16), ("bare", np.float32)):
            answer = client.infer(name, {"x": np.ones((3, 5, 16), dtype)})["y"]
            assert np.array_equal(answer, np.full((3, 5, 16), 8, dtype))
        answer = client.infer("table", {"x": np.ones((3, 5), np.int64)})["y"]
        assert np.array_equal(answer, np.full((3, 5, 16), 8, np.float32))


def test_a_version_keeps_its_lineage_and_settings(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "production"
    for pairs in (("--set", "instances=2", "--set", "queue_delay_us=9"), ("--set", "instances=3")):
        name = place / TINY / "1" if len(pairs) == 4 else other / TINY / "1"
        done = serve("add", str(name), "--repository", str(other), "--no-check", *pairs, "--json")
        assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["number"], document["state"]) == (TINY, 2, "staged")
    lineage = repository.read_lineage(other, TINY, 2)
    assert lineage["made_by"] == "a test"
    assert lineage["serve"] == {"instances": 3, "queue_delay_us": 9}
    assert lineage["source"]["path"] == str(other / TINY / "1")
    assert lineage["inputs"] == [spec.document() for spec in TINY_INPUTS]
    assert [standing.state for standing in rollout.standings(other, TINY)] == ["live", "staged"]
    repository.verify(other)


def test_the_proof_goes_with_a_version_and_is_served_and_checked(tmp_path: Path, server_prefix: Path) -> None:
    place, other = tmp_path / "repository", tmp_path / "production"
    onnx = save_tiny(tmp_path / "tiny.onnx")
    with staging.stage(place, TINY, source.Source(onnx, TINY_INPUTS, TINY_OUTPUTS), Target(cores=1)) as staged:
        staging.publish(staged, {}, "<p>proof</p>")
    added = serve("add", str(place / TINY / "1"), "--repository", str(other))
    assert added.returncode == 0, added.stderr
    page = other / TINY / "1" / "report.html"
    assert page.read_text() == "<p>proof</p>"
    assert f"  page: {page}\n" in serve("why", TINY, "--repository", str(other)).stdout
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    asked = ("why", TINY, "--repository", str(other), "--open")
    assert serve(*asked, env={**os.environ, "BROWSER": f"{browser} %s"}).returncode == 0
    assert (tmp_path / "opened").read_text().strip() == page.as_uri()
    nowhere = serve(*asked, env={**os.environ, "BROWSER": "/bin/false %s", "PATH": str(tmp_path)})
    assert (nowhere.returncode, f"open it elsewhere: {page}" in nowhere.stderr) == (5, True), nowhere.stderr
    checked = serve("check", "--repository", str(other), "--json")
    assert (checked.returncode, json.loads(checked.stdout)["findings"]) == (0, []), checked.stdout
    with running(other, grace=0) as endpoint, connect(endpoint.grpc) as client:
        assert client.infer(TINY, {"x": np.ones((1, 4), np.float32)})["y"].shape == (1, 3)


def test_a_file_tells_its_specs(tmp_path: Path) -> None:
    found = source.load(save_tiny(tmp_path / "tiny.onnx"), {})
    assert (found.inputs, found.outputs) == (TINY_INPUTS, TINY_OUTPUTS)
    with pytest.raises(UsageError, match="the sizes of the dim tokens of x are not known"):
        source.load(free(tmp_path / "free.onnx"), {})
    found = source.load(tmp_path / "free.onnx", {"tokens": TOKENS})
    assert found.inputs == (TensorSpec("x", "float32", (BATCH, TOKENS)),)
    with pytest.raises(UsageError, match="--dim x_1="):
        source.load(free(tmp_path / "nameless.onnx", ""), {})
    assert source.load(tmp_path / "nameless.onnx", {"x_1": TOKENS}).inputs[0].dims == (BATCH, TOKENS)


def test_a_bundle_tells_ranges_and_values(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    free(bundle / "model.onnx")
    spec = TensorSpec("x", "float32", (BATCH, TOKENS), values=(-3, 3))
    described = {
        "name": "free",
        "inputs": [spec.document()],
        "digests": {"model.onnx": repository.digest(bundle / "model.onnx")},
        "lineage": [{"name": "export.onnx", "quality": {"metric": "accuracy", "value": 0.5}}],
    }
    (bundle / "bundle.json").write_text(json.dumps(described))
    found = source.load(bundle, {})
    assert (found.name, found.inputs) == ("free", (spec,))
    assert found.lineage["lineage"] == described["lineage"]
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes() + b" ")
    with pytest.raises(BadRepository, match="was changed after it was written"):
        source.load(bundle, {})
    (bundle / "bundle.json").write_text("{}")
    with pytest.raises(BadRepository, match="is not a bundle of this version"):
        source.load(bundle, {})


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("nothing.onnx", "--name", "m"), 4, "is no model"),
        (("FILE",), 2, "the model needs a name"),
        (("FILE", "--name", "a/b"), 2, "cannot be a folder"),
        (("FILE", "--name", "m", "--set", "instances=many"), 2, "instances = 'many' cannot be"),
        (("FILE", "--name", "m", "--set", "gpus=[0]"), 4, "gpus: only a GPU has that"),
        (("FILE", "--name", "m", "--dim", "tokens=1,2"), 2, "not three sizes"),
        (("FILE", "--name", "m", "--dim", "tokens=3,2,1"), 2, "needs 1 <= minimum <= typical <= maximum"),
        (("FILE", "--name", "m", "--dim", "tokens=1,2,3"), 2, "--dim tokens would have no effect"),
        (("VERSION", "--dim", "batch=1,2,3"), 2, "those of a version stay as they are"),
        (("FILE", "--name", "m", "--batch", "all"), 2, "not batch sizes"),
        (("FILE", "--name", "m", "--batch", "0,4"), 2, "--batch: Input should be greater than or equal to 1"),
        (("FILE", "--name", "m", "--device", "cuda", "--runtime", "openvino"), 2, "openvino runs on a CPU"),
        (("FILE", "--name", "m", "--settings", "none.toml"), 4, "none.toml"),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    place: Path, tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    file = save_tiny(tmp_path / "tiny.onnx")
    places = {"FILE": str(file), "VERSION": str(place / TINY / "1")}
    arguments = [places.get(option, option) for option in options]
    done = serve("add", *arguments, "--repository", str(place), "--no-check")
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert repository.models(place) == [TINY]
    assert repository.numbers(place, TINY) == [1]


def test_a_model_that_does_not_load_is_not_added(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    import onnx

    file = save_tiny(tmp_path / "tiny.onnx")
    model = onnx.load(file)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, file)
    done = serve("add", str(file), "--name", TINY, "--repository", str(place))
    assert done.returncode == 4
    assert "NoSuchOperator" in done.stderr
    assert repository.numbers(place, TINY) == [1]


def test_a_full_disk_loses_nothing(tmp_path: Path, publish_tiny: Callable[..., staging.Version]) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        publish_tiny(small / "model_repository")
        onnx = save_tiny(tmp_path / "large.onnx", np.zeros((400, 400), np.float32))
        done = serve("add", str(onnx), "--name", TINY, "--repository", str(small / "model_repository"), "--no-check")
        assert done.returncode == 5
        assert "the disk is full" in done.stderr
        assert repository.numbers(small / "model_repository", TINY) == [1]
        assert sorted(path.name for path in small.iterdir()) == ["model_repository"]
        repository.verify(small / "model_repository")
    finally:
        subprocess.run(["umount", small], check=True)
