"""What a server refuses is told with what to do about it, by `serve up` and `serve add` as by `serve check`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto as T

from modelathe.errors import ModelatheError
from serve.config.errors import BadRepository, ModelRefused, ServerFailed
from serve.server import ending
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save
from tests.serve.commands.test_up import FREE, serve, up
from tests.serve.repository.test_contradictions import HEAD, X, Y, rows


def ensemble(place: Path, called: str, kind: str = "FP32", largest: int = 8) -> None:
    tensors = f"{X} {Y}".replace("FP32", kind)
    maps = 'input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
    step = f'ensemble_scheduling {{ step {{ model_name: "{called}" model_version: -1 {maps} }} }}'
    (place / "whole" / "1").mkdir(parents=True, exist_ok=True)
    (place / "whole" / "config.pbtxt").write_text(f'platform: "ensemble" max_batch_size: {largest} {tensors} {step}')


def configure(place: Path, text: str) -> None:
    (place / "rows" / "config.pbtxt").write_text(text)


CASES: dict[str, tuple[Callable[[Path], None], str, str, Callable[[Path], None]]] = {
    "larger batches than a step takes": (
        *(lambda place: ensemble(place, "rows", largest=9), "allows maximum batch size", "lower its max_batch_size"),
        lambda place: ensemble(place, "rows"),
    ),
    "another type than a step takes": (
        *(lambda place: ensemble(place, "rows", "FP16"), "inconsistent data type", "give the tensor the same type"),
        lambda place: ensemble(place, "rows"),
    ),
    "the configuration of another": (
        *(lambda place: configure(place, f'name: "other" {HEAD} {X} {Y}'), "unexpected directory name"),
        *("copy the right config.pbtxt, or set name", lambda place: configure(place, f'name: "rows" {HEAD} {X} {Y}')),
    ),
    "another file": (
        *(lambda place: configure(place, f'default_model_filename: "net.onnx" {HEAD} {X} {Y}'), "No such file"),
        *("put that file there", lambda place: rows(place / "rows" / "1" / "net.onnx")),
    ),
    "a backend that nobody has": (
        *(lambda place: configure(place, f'platform: "tensorflow_graphdef" max_batch_size: 8 {X} {Y}'), "backend"),
        *("correct the name of its backend", lambda place: configure(place, f"{HEAD} {X} {Y}")),
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "repository"
    (place / "rows" / "1").mkdir(parents=True)
    rows(place / "rows" / "1" / "model.onnx")
    configure(place, f"{HEAD} {X} {Y}")
    return place


@pytest.mark.parametrize("case", CASES)
def test_the_way_out_stands_beside_the_reason_and_works(case: str, place: Path, server_prefix: Path) -> None:
    spoil, says, fix, mend = CASES[case]
    spoil(place)
    with pytest.raises(ModelRefused, match=says) as failure, running(place):
        pass
    assert failure.value.fix.startswith(fix)
    named = re.search(r"the server's log has more: (\S+)$", failure.value.fix)
    assert named and says in Path(named[1]).read_text()
    Path(named[1]).unlink()
    mend(place)
    with running(place, grace=0):
        pass


def test_what_no_server_can_complete_is_found_before_it_starts(place: Path, server_prefix: Path) -> None:
    (place / "rows" / "config.pbtxt").unlink()
    save(place / "rows" / "1" / "model.onnx", [("Relu", ["x"], ["y"])], [("x", T.FLOAT, None)], [("y", T.FLOAT, None)])
    with pytest.raises(BadRepository, match="nothing says of which type x is") as failure, running(place):
        pass
    assert failure.value.where.endswith("rows/1/model.onnx")
    rows(place / "rows" / "1" / "model.onnx")
    with running(place, grace=0):
        pass


def own_operator(path: Path) -> Path:
    """Give the model an operator that no server has."""
    import onnx

    model = onnx.load(path)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    onnx.save(model, path)
    return path


def test_a_model_that_is_added(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    path = own_operator(rows(tmp_path / "own.onnx"))
    done = serve("add", str(path), "--name", "own", "--repository", str(place))
    assert done.returncode == 4, done.stderr
    assert "com.example:Relu" in done.stderr
    assert "fix: export the model again with operators of ONNX alone" in done.stderr


def test_a_version_that_a_running_server_does_not_load(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    path = rows(tmp_path / "rows.onnx")
    add = ("--name", "live", "--repository", str(place))
    assert serve("add", str(path), *add).returncode == 0
    own_operator(path)
    assert serve("add", str(path), *add, "--no-check").returncode == 0
    with up(place, tmp_path / "run") as (_, ready):
        said = serve("promote", "live", "2", "--repository", str(place), env={"XDG_RUNTIME_DIR": str(tmp_path / "run")})
        assert said.returncode == 4, ready
    assert re.search(
        r"what was live still is: does not load live: model\.onnx cannot be loaded: .*Relu\S* is not a", said.stderr
    )
    assert "{" not in said.stderr and "At:" not in said.stderr
    assert "fix: export the model again with operators of ONNX alone" in said.stderr


def test_the_log_of_a_detached_server_is_where_the_error_says(place: Path, tmp_path: Path, server_prefix: Path) -> None:
    ensemble(place, "rows", largest=9)
    env = {"XDG_RUNTIME_DIR": str(tmp_path / "run")}
    said = json.loads(serve("up", str(place), *FREE, "--detach", "--json", env=env).stdout)["error"]
    assert "allows maximum batch size" in Path(said["fix"].rpartition(" ")[2]).read_text()
    ensemble(place, "rows")
    try:
        assert serve("up", str(place), *FREE, "--detach", env=env).returncode == 0
        logs = list((tmp_path / "run" / "modelathe").glob("*.log"))
        assert len(logs) == 1, logs  # that of the one before is swept
    finally:
        assert serve("down", env=env).returncode == 0


@pytest.mark.parametrize("kind", ["BFLOAT16", "FLOAT8E4M3FN", "COMPLEX64"])
def test_a_type_that_nothing_carries(kind: str, place: Path, tmp_path: Path, server_prefix: Path) -> None:
    given, made = [("x", getattr(T, kind), ["N", 4])], [("y", T.FLOAT, ["N", 4])]
    add = ("--name", "typed", "--repository", str(place))
    path = save(tmp_path / "typed.onnx", [("Cast", ["x"], ["y"], {"to": T.FLOAT})], given, made)
    done = serve("add", str(path), *add)
    assert (done.returncode, f"typed.onnx: x is {kind.lower()[:6]}" in done.stderr) == (4, True), done.stderr
    assert "fix: export the model with a Cast beside it" in done.stderr
    nodes = [("Cast", ["x"], ["z"], {"to": T.BFLOAT16}), ("Cast", ["z"], ["y"], {"to": T.FLOAT})]
    path = save(tmp_path / "typed.onnx", nodes, [("x", T.FLOAT, ["N", 4])], made)
    assert serve("add", str(path), *add).returncode == 0


def test_a_folder_in_the_place_of_a_models_name(place: Path, server_prefix: Path) -> None:
    done = serve("check", str(place))
    assert done.returncode == 2
    assert f"{place}: is a folder, not the name of a model" in done.stderr
    assert serve("check", *done.stderr.partition("fix: say ")[2].split()).returncode == 0


def test_no_reason_names_a_function_of_the_runtime(place: Path, server_prefix: Path) -> None:
    import onnx

    path = place / "rows" / "1" / "model.onnx"
    model = onnx.load(path)
    model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises(ModelatheError, match="cannot be loaded: ONNX Runtime only") as failure, running(place):
        pass
    assert "fix: export the model again with an older opset" in str(failure.value)


@pytest.mark.parametrize(
    ("said", "machine"),
    [
        ("Failed to allocate memory for requested buffer of size 8589934592", True),
        ("std::bad_alloc", True),
        ("Unable to initialize shared memory key: No space left on device", True),
        ("model 'memory_net', version 1: unexpected inference output 'memory'", False),
    ],
)
def test_a_model_that_is_called_memory_is_no_lack_of_it(said: str, machine: bool) -> None:
    assert ending.kind(said, refused=True) is (ServerFailed if machine else ModelRefused)
    assert ("a machine with more memory" in ending.fix(said)) == machine


@pytest.mark.parametrize(("ready", "kind"), [(False, ModelRefused), (True, ServerFailed)])
def test_a_server_that_dies_of_a_refused_warm_up(ready: bool, kind: type[Exception], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text('I0101 server started\nE0101 "a request failed: the input x holds NaN or infinity"\n')
    found = ending.error("http://127.0.0.1:1", log, -11, ready=ready)
    assert type(found) is kind
    assert found.what.endswith("killed by SIGSEGV after a request failed: the input x holds NaN or infinity")
