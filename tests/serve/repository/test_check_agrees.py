"""`serve check` says yes exactly when a real server loads a model and answers, whatever was written by hand."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T

from modelathe.client import connect
from modelathe.errors import ModelatheError
from serve.cli import main
from serve.server import tritonserver as server
from serve.server.tritonserver import running
from tests.serve.backends.test_backend import save

Tensor = tuple[str, str, list[int], str]
"""Name, type, dims without the batch axis, and what else the configuration says."""


@dataclass(frozen=True)
class Graph:
    """A model: its file, its tensors as a configuration states them, and a request; `batch` where it has the axis."""

    make: Callable[[Path], Path]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    request: dict[str, Any]
    batch: bool = True


ROW = np.ones((1, 4), np.float32)
GRAPHS = {
    "rows": Graph(
        lambda path: save(path, [("Relu", ["x"], ["y"])], [("x", T.FLOAT, ["N", 4])], [("y", T.FLOAT, ["N", 4])]),
        *((("x", "FP32", [4], ""),), (("y", "FP32", [4], ""),), {"x": ROW}),
    ),
    "labels": Graph(
        lambda path: save(
            *(path, [("ArgMax", ["x"], ["y"], {"axis": 1, "keepdims": 0})]),
            *([("x", T.FLOAT, ["N", 4])], [("y", T.INT64, ["N"])]),
        ),
        *((("x", "FP32", [4], ""),), (("y", "INT64", [1], "reshape { shape: [] }"),), {"x": ROW}),
    ),
    "a default": Graph(
        lambda path: save(
            *(path, [("Mul", ["x", "scale"], ["y"])]),
            *([("x", T.FLOAT, [4]), ("scale", T.FLOAT, [1])], [("y", T.FLOAT, [4])]),
            [("scale", np.ones(1, np.float32))],
        ),
        (("x", "FP32", [4], ""), ("scale", "FP32", [1], "optional: true")),
        *((("y", "FP32", [4], ""),), {"x": ROW[0]}, False),
    ),
    "a second output without a rank": Graph(
        lambda path: save(
            *(path, [("Relu", ["x"], ["y"]), ("NonZero", ["x"], ["z"])]),
            *([("x", T.FLOAT, ["N", 4])], [("y", T.FLOAT, ["N", 4]), ("z", T.INT64, None)]),
        ),
        *((("x", "FP32", [4], ""),), (("y", "FP32", [4], ""),), {"x": ROW}),
    ),
}


@dataclass(frozen=True)
class Written:
    """What somebody wrote into a repository."""

    graph: str = "rows"
    name: str = ""
    backend: str = 'backend: "onnxruntime"'
    tensors: str = "right"
    batch: str = "right"
    policy: str = ""
    warmup: str = ""
    file: str = "there"
    place: str = "a folder"


CHOICES: dict[str, list[str]] = {
    "graph": list(GRAPHS),
    "name": ["", 'name: "m"', 'name: "other"'],
    "backend": ['backend: "onnxruntime"', 'platform: "onnxruntime_onnx"', ""],
    "tensors": ["right", "right", "none", "another type", "another size", "another name"],
    "batch": ["right", "right", "the other way"],
    "policy": ["", "latest { num_versions: 2 }", "specific { versions: [1] }", "specific { versions: [9] }", "all { }"],
    "warmup": ["", "right", "wrong"],
    "file": ["there", "there", "there", "garbage", "none"],
    "place": ["a folder", "a link"],
}
ODD = [
    *(Written(graph=graph) for graph in list(GRAPHS)[1:]),
    *(Written(backend=backend) for backend in CHOICES["backend"][1:]),
    *(Written(place="a link"), Written(warmup="wrong", backend=CHOICES["backend"][1]), Written(tensors="none")),
]
"""What check and server did not agree on once, and its neighbours."""


def config(asked: Written, graph: Graph) -> str:
    changed = {
        "another type": lambda name, kind, dims: (name, "INT32" if kind != "INT32" else "FP32", dims),
        "another size": lambda name, kind, dims: (name, kind, [*dims[:-1], 7]),
        "another name": lambda name, kind, dims: (f"{name}{name}", kind, dims),
    }
    batched = graph.batch is (asked.batch == "right")
    lines = [asked.name, asked.backend, f"max_batch_size: {8 * batched}"]
    for kind, tensors in (("input", graph.inputs), ("output", graph.outputs)):
        for place, (name, dtype, dims, more) in enumerate(tensors if asked.tensors != "none" else ()):
            wrong = changed.get(asked.tensors) if place == 0 else None
            name, dtype, dims = wrong(name, dtype, dims) if wrong else (name, dtype, dims)
            lines.append(f'{kind} {{ name: "{name}" data_type: TYPE_{dtype} dims: {dims} {more} }}')
    lines.append(f"version_policy {{ {asked.policy} }}" if asked.policy else "")
    if asked.warmup:
        size = 4 if asked.warmup == "right" else 5
        value = f"{{ data_type: TYPE_FP32 dims: [{size}] zero_data: true }}"
        lines.append(f'model_warmup {{ name: "w" batch_size: {int(batched)} inputs {{ key: "x" value: {value} }} }}')
    return "\n".join(lines)


def lay_out(asked: Written, at: Path) -> Path:
    graph, home = GRAPHS[asked.graph], at / ("elsewhere" if asked.place == "a link" else "repository") / "m"
    (home / "1").mkdir(parents=True)
    (home / "config.pbtxt").write_text(config(asked, graph))
    if asked.file == "there":
        graph.make(home / "1" / "model.onnx")
    elif asked.file == "garbage":
        (home / "1" / "model.onnx").write_bytes(b"\x08no graph at all")
    if asked.place == "a link":
        (at / "repository").mkdir()
        (at / "repository" / "m").symlink_to(home)
    return at / "repository"


def serves(asked: Written, place: Path) -> bool:
    """Whether a server loads and answers, with nothing of ours that looks at the files before."""
    graph = GRAPHS[asked.graph]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_check_servable", lambda *_: None)
        try:
            with running(place, grace=0, timeout=30) as endpoint, connect(endpoint.grpc) as client:
                client.infer("m", graph.request)
        except ModelatheError:
            return False
    return True


def agree(asked: Written, at: Path) -> None:
    place = lay_out(asked, at)
    done = CliRunner().invoke(main, ["check", "--repository", str(place), "--json"])
    findings = json.loads(done.stdout)["findings"]
    assert done.exit_code == (4 if any(finding["level"] == "error" for finding in findings) else 0), findings
    assert not any("not tried" in finding["what"] for finding in findings)
    assert (done.exit_code == 0) is serves(asked, place), findings


@pytest.mark.slow
@pytest.mark.parametrize("asked", ODD, ids=repr)
def test_what_is_written_otherwise(asked: Written, tmp_path: Path, server_prefix: Path) -> None:
    agree(asked, tmp_path)


def choices() -> st.SearchStrategy[Written]:
    """One or two things besides the usual."""
    some = st.lists(st.sampled_from(list(CHOICES)), min_size=2, max_size=3, unique=True)
    return some.flatmap(
        lambda keys: st.tuples(*(st.sampled_from(CHOICES[key]) for key in keys)).map(
            lambda values: replace(Written(), **dict(zip(keys, values, strict=True)))
        )
    )


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(asked=choices())
def test_check_says_what_a_server_does(
    asked: Written, tmp_path_factory: pytest.TempPathFactory, server_prefix: Path
) -> None:
    at = tmp_path_factory.mktemp("agree")
    agree(asked, at)
    shutil.rmtree(at)
