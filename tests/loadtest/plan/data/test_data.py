"""Every kind of data: what is read from it, and that bad data is one clear line and nothing else."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loadtest.plan.data import read, recorded, trace
from loadtest.plan.data.request import Data, Signature
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import BATCH, UNBOUNDED, Dim, TensorSpec

X = TensorSpec("x", "float32", (BATCH, 3), (-2.0, 2.0))
Y = TensorSpec("y", "float32", (BATCH, 2))
IDS = TensorSpec("ids", "int64", (BATCH, Dim("tokens", 1, 5, 9)), (0, 99))
OPEN = TensorSpec("m", "int32", (Dim("a", 1, 1, UNBOUNDED), Dim("b", 1, 1, UNBOUNDED)))
UNBATCHED = TensorSpec("x", "float32", (3,))
TEXT = TensorSpec("text", "object", (BATCH, 1))


def take(path: Path, *inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (), batch: int = 1) -> Data:
    return read.read(path, Signature(inputs, outputs), batch)


def write(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def b64(array: np.ndarray) -> dict[str, str]:
    return {"b64": b64encode(array.tobytes()).decode()}


def test_an_npz_is_cut_into_requests(tmp_path: Path) -> None:
    x, ids = np.arange(21, dtype=np.float32).reshape(7, 3), np.arange(35).reshape(7, 5)
    np.savez(tmp_path / "d.npz", x=x, ids=ids, y=x[:, :2])
    data = take(tmp_path / "d.npz", X, IDS, outputs=(Y,), batch=3)
    assert len(data.payloads) == 2
    np.testing.assert_array_equal(data.payloads[1]["x"], x[3:6])
    np.testing.assert_array_equal(data.payloads[1]["ids"], ids[3:6])
    np.testing.assert_array_equal(data.expected[1]["y"], x[3:6, :2])


def test_a_model_without_batch_axis_gets_single_samples(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "d.npz", x=x)
    data = take(tmp_path / "d.npz", UNBATCHED)
    assert [request["x"].tolist() for request in data.payloads] == x.tolist()
    assert data.expected == []


def test_strings_of_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", text=np.array([["zwölf"], ["2"]]))
    assert take(tmp_path / "d.npz", TEXT).payloads[0]["text"].tolist() == [["zwölf".encode()]]


GOOD = np.zeros((4, 3), np.float32)
BAD_ARRAYS = {
    "missing": ({}, "inputs are x"),
    "misnamed": ({"z": GOOD}, "has the arrays z"),
    "extra": ({"x": GOOD, "z": GOOD}, "has the arrays x, z"),
    "dtype": ({"x": GOOD.astype(np.float64)}, "dtype float64"),
    "shape": ({"x": np.zeros((4, 5), np.float32)}, r"shape \[4, 5\]"),
    "rank": ({"x": np.zeros(3, np.float32)}, r"shape \[3\]"),
    "scalar": ({"x": np.float32(1)}, "shape"),
    "no samples": ({"x": GOOD[:0]}, "has 0 samples"),
    "nan": ({"x": np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)}, "sample 1"),
    "infinite": ({"x": np.array([[np.inf, 0, 0]], np.float32)}, "sample 0"),
    "objects": ({"x": np.array([{"a": 1}], dtype=object)}, "Python objects"),
    "bad output": ({"x": GOOD, "y": GOOD}, "d.npz: y"),
    "lengths": ({"x": GOOD, "y": GOOD[:2, :2]}, "different numbers of samples"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_cannot_be_sent(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(BadInput, match=message) as caught:
        take(tmp_path / "d.npz", X, outputs=(Y,))
    assert "d.npz" in str(caught.value)


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "empty.npz").touch()
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, GOOD)
    (tmp_path / "folder.npz").mkdir()
    for name in ("text.npz", "cut.npz", "empty.npz", "one.npz", "none.npz", "folder.npz", "none", "none.bin"):
        with pytest.raises(BadInput):
            take(tmp_path / name, X)


def test_perf_analyzers_json(tmp_path: Path) -> None:
    rows = [{"x": [1, 2, 3], "ids": {"content": [1, 2, 3], "shape": [3]}}, {"x": [[4, 5, 6]], "ids": [7, 8, 9]}]
    rows += [{"x": b64(GOOD[0]), "ids": {"content": b64(np.arange(2)), "shape": [2]}}]
    right = [{"y": [1, 2]}, {"y": {"content": [3, 4], "shape": [2]}}, {}]
    path = write(tmp_path / "d.json", {"data": rows, "validation_data": right})
    data = take(path, X, IDS, outputs=(Y,))
    assert [request["x"].tolist() for request in data.payloads] == [[[1, 2, 3]], [[4, 5, 6]], [[0, 0, 0]]]
    assert [request["ids"].tolist() for request in data.payloads] == [[[1, 2, 3]], [[7, 8, 9]], [[0, 1]]]
    assert data.payloads[0]["ids"].dtype == np.int64
    assert [{name: array.tolist() for name, array in right.items()} for right in data.expected] == [
        {"y": [[1, 2]]}, {"y": [[3, 4]]}, {}
    ]  # fmt: skip
    [pair] = take(path, X, IDS, outputs=(Y,), batch=2).payloads
    assert pair["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(BadInput, match="differ in shape"):
        take(path, X, IDS, outputs=(Y,), batch=3)


def test_perf_analyzers_sequences_and_strings(tmp_path: Path) -> None:
    # The example of perf_analyzer's docs/input_data.md.
    lengths = (4, 3, 2)
    streams = [[{"text": [str(place)]} for place in range(length)] for length in lengths]
    data = take(write(tmp_path / "d.json", {"data": streams}), TEXT)
    assert data.streams == list(lengths)
    assert [request["text"].item() for request in data.payloads] == [
        b"0",
        b"1",
        b"2",
        b"3",
        b"0",
        b"1",
        b"2",
        b"0",
        b"1",
    ]
    with pytest.raises(UsageError, match="sequences"):
        take(tmp_path / "d.json", TEXT, batch=2)
    raw = {"content": {"b64": b64encode(b"\x02\0\0\0ab").decode()}, "shape": [1]}
    assert take(write(tmp_path / "d.json", {"data": [{"text": raw}]}), TEXT).payloads[0]["text"].item() == b"ab"


def test_sizes_that_the_model_leaves_open(tmp_path: Path) -> None:
    entries = [{"m": {"content": list(range(16)), "shape": shape}} for shape in ([2, 8], [8, 2])]
    data = take(write(tmp_path / "d.json", {"data": [*entries, {"m": [[1, 2], [3, 4]]}]}), OPEN)
    assert [request["m"].shape for request in data.payloads] == [(2, 8), (8, 2), (2, 2)]


BAD_JSON = {
    "not json": ("{", "line 1 column 2"),
    "no data": ({}, 'no list "data"'),
    "a list": ([], 'no list "data"'),
    "empty": ({"data": []}, "no request"),
    "empty sequences": ({"data": [[]]}, "no request"),
    "entry": ({"data": [1]}, r"data\[0\]"),
    "mixed": ({"data": [[{"x": [1, 2, 3]}], {"x": [1, 2, 3]}]}, r"data\[1\] is no sequence"),
    "name": ({"data": [{"x": [1, 2, 3]}, {"z": [1, 2, 3]}]}, r"data\[1\]: has the arrays z"),
    "count": ({"data": [{"x": [1, 2]}]}, r"data\[0\]: x: has 2 values"),
    "shape": ({"data": [{"x": {"content": [1, 2, 3, 4], "shape": [4]}}]}, r"has the shape \[4\]"),
    "shape negative": ({"data": [{"x": {"content": [1, 2, 3], "shape": [-3]}}]}, "shape"),
    "shape of text": ({"data": [{"x": {"content": [1, 2, 3], "shape": "3"}}]}, "shape"),
    "shape huge": ({"data": [{"x": {"content": [1, 2, 3], "shape": [2**30] * 9}}]}, "shape"),
    "strings": ({"data": [{"x": ["1", "2", "3"]}]}, "something else than float32"),
    "true": ({"data": [{"x": [True, False, True]}]}, "something else"),
    "ragged": ({"data": [{"x": [[1], [2, 3]]}]}, "different lengths"),
    "nan": ('{"data": [{"x": [1, NaN, 3]}]}', "NaN"),
    "overflow": ({"data": [{"x": [1e300, 2, 3]}]}, "range of float32"),
    "a number": ({"data": [{"x": 3}]}, "neither a list"),
    "base64": ({"data": [{"x": {"b64": "*"}}]}, "base64"),
    "base64 of a number": ({"data": [{"x": {"b64": 3}}]}, "base64"),
    "odd bytes": ({"data": [{"x": {"b64": "AAAA"}}]}, "3 bytes"),
    "validation": ({"data": [{"x": [1, 2, 3]}], "validation_data": []}, ""),
    "validation count": ({"data": [{"x": [1, 2, 3]}], "validation_data": [{}, {}]}, "an entry for each"),
    "validation name": ({"data": [{"x": [1, 2, 3]}], "validation_data": [{"q": [1]}]}, "no output"),
    "deep": ('{"data": ' + "[" * 100_000, "nested too deeply"),
    "not utf-8": (b'{"data": "\xff"}', "UTF-8"),
}


@pytest.mark.parametrize(("document", "message"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_json_that_cannot_be_sent(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(document) if isinstance(document, bytes) else write(path, document)
    if not message:
        assert take(path, X).expected == []
        return
    with pytest.raises(BadInput, match=message) as caught:
        take(path, X, outputs=(Y,))
    assert str(caught.value).startswith(str(path))
    assert "fix: " in str(caught.value)


def test_integers_are_never_cut_silently(tmp_path: Path) -> None:
    spec = TensorSpec("k", "uint8", (2,))
    for content, message in (([1, 300], "range of uint8"), ([1, -1], "range"), ([1.5, 2], "something else")):
        with pytest.raises(BadInput, match=message):
            take(write(tmp_path / "d.json", {"data": [{"k": content}]}), spec)


def test_a_folder_of_whole_requests(tmp_path: Path) -> None:
    for n in (2, 1):
        np.savez(tmp_path / f"{n}.npz", x=np.full((n, 3), n, np.float32), y=np.full((n, 2), n, np.float32))
    data = take(tmp_path, X, outputs=(Y,))
    assert [request["x"].shape for request in data.payloads] == [(1, 3), (2, 3)]
    assert [right["y"].shape for right in data.expected] == [(1, 2), (2, 2)]
    with pytest.raises(UsageError, match="whole request"):
        take(tmp_path, X, outputs=(Y,), batch=2)
    np.savez(tmp_path / "3.npz", x=np.zeros((65, 3), np.float32))
    with pytest.raises(BadInput, match=r"3\.npz: x: has the shape \[65, 3\]"):
        take(tmp_path, X, outputs=(Y,))


def test_a_folder_as_perf_analyzer_takes_it_and_one_of_such_folders(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "x").write_bytes(np.full(3, value, np.float32).tobytes())
        np.save(tmp_path / "all" / name / "ids.npy", np.full(4, value))
        (tmp_path / "all" / name / "y").write_bytes(np.full(2, value, np.float32).tobytes())
    data = take(tmp_path / "all" / "one", X, IDS, outputs=(Y,))
    assert [request["x"].tolist() for request in data.payloads] == [[[1, 1, 1]]]
    assert data.payloads[0]["ids"].tolist() == [[1, 1, 1, 1]]
    assert data.expected[0]["y"].tolist() == [[1, 1]]
    both = take(tmp_path / "all", X, IDS, outputs=(Y,), batch=2)
    assert [request["x"].tolist() for request in both.payloads] == [[[1, 1, 1], [2, 2, 2]]]
    (tmp_path / "all" / "two" / "ids.npy").unlink()
    with pytest.raises(BadInput, match=r"two: has the arrays x, y; the model's inputs are x, ids"):
        take(tmp_path / "all", X, IDS, outputs=(Y,))


def test_a_folder_of_files_for_the_only_input(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8" + name.encode())
    assert [request["text"].tolist() for request in take(tmp_path, TEXT).payloads] == [
        [[b"\xff\xd8a.jpg"]], [[b"\xff\xd8b.jpg"]]
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"a\.jpg: has 7 bytes"):
        take(tmp_path, X)
    with pytest.raises(BadInput, match="names none"):
        take(tmp_path, X, IDS)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is empty"):
        take(tmp_path, X)


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("ein Satz\n\nzwölf\n")
    texts = [request["text"].tolist() for request in take(tmp_path / "d.txt", TEXT).payloads]
    assert texts == [[[b"ein Satz"]], [["zwölf".encode()]]]
    with pytest.raises(BadInput, match="takes x: float32"):
        take(tmp_path / "d.txt", X)
    (tmp_path / "d.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(BadInput, match="not UTF-8 text: byte 5"):
        take(tmp_path / "d.txt", TEXT)
    (tmp_path / "d.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="no lines"):
        take(tmp_path / "d.txt", TEXT)


def tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> dict[str, Any]:
    return {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}


def test_recorded_traffic(tmp_path: Path) -> None:
    first = {"at": 5.0, "model": "a", "inputs": [tensor("x", GOOD[:2])], "outputs": [tensor("y", GOOD[:2, :2])]}
    second = {"at": 5.5, "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": b64(GOOD[:1] + 1)}]}
    path = write(tmp_path / "d.jsonl", f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
    assert [line.model for line in recorded.lines(path)] == ["a", ""]
    assert recorded.holds_requests(path)
    data = take(path, X, outputs=(Y,))
    assert [request["x"].tolist() for request in data.payloads] == [[[0, 0, 0], [0, 0, 0]], [[1, 1, 1]]]
    assert [list(right) for right in data.expected] == [["y"], []]
    assert trace.read(path) == [0.0, 0.5]
    with pytest.raises(UsageError, match="whole request"):
        take(path, X, batch=2)


GOOD_LINE = {"at": 0, "inputs": [tensor("x", GOOD[:1])]}
BAD_LINES = {
    "empty": ("", "no lines"),
    "not json": ("{}\n{", "line 2: is not JSON"),
    "a list": ("[]", "line 1: is no request"),
    "model": ('{"model": 3}', "the model is 3"),
    "no inputs": ({"at": 0}, '"inputs" is no list'),
    "inputs": ({"inputs": {"x": 1}}, '"inputs" is no list'),
    "names": ({"inputs": [tensor("z", GOOD)]}, "has the arrays z"),
    "datatype": ({"inputs": [tensor("x", GOOD, "FP64")]}, "'FP64'"),
    "shape": ({"inputs": [tensor("x", GOOD.T)]}, r"\[3, 4\]"),
    "batch": ({"inputs": [tensor("x", np.zeros((65, 3)))]}, r"\[65, 3\]"),
    "no data": ({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32"}]}, "neither a list"),
    "too few": ({"inputs": [{**tensor("x", GOOD[:1]), "data": [1]}]}, "has 1 values"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_recordings_that_cannot_be_sent(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "d.jsonl", line)
    with pytest.raises(BadInput, match=message) as caught:
        take(path, X)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("written", "times"),
    [
        ("1\n2.5\n2.5\n", [0, 1.5, 1.5]),
        ("time,bytes\n0,7\n# a remark\n\n0.25,7\n", [0, 0.25]),
        ("at,model\n100,a\n\n# a pause\n101.5,b\n", [0, 1.5]),
        ("1700000000.5 GET\n1700000001 GET", [0, 0.5]),
    ],
)
def test_traces(tmp_path: Path, written: str, times: list[float]) -> None:
    path = write(tmp_path / "t.csv", written)
    assert trace.read(path) == times
    assert trace.read(path, 2.0) == [at / 2 for at in times]


def test_the_length_of_a_trace() -> None:
    assert trace.length([0.0, 1.0, 2.0]) == 3.0
    assert trace.length([0.0, 0.0]) == trace.length([0.0]) == 1.0


BAD_TRACES = {
    "empty": ("t.csv", "", "no times"),
    "heading only": ("t.csv", "time\n", "no times"),
    "unsorted": ("t.csv", "1\n0.5\n", "line 2 is before"),
    "negative": ("t.csv", "-1\n", "'-1' in line 1 is not a time"),
    "nan": ("t.csv", "0\nnan\n", "line 2"),
    "infinite": ("t.csv", "0\ninf\n", "line 2"),
    "words": ("t.csv", "0\nsoon\n", "'soon' in line 2"),
    "no at": ("t.jsonl", "{}", "line 1"),
    "at of text": ("t.jsonl", '{"at": "soon"}', "line 1"),
    "at huge": ("t.jsonl", '{"at": 1' + "0" * 400 + "}", "line 1"),
    "at true": ("t.jsonl", '{"at": true}', "line 1"),
    "unsorted recording": ("t.jsonl", '{"at": 1}\n\n{"at": 0}', "line 3 is before"),
}


@pytest.mark.parametrize(("name", "written", "message"), BAD_TRACES.values(), ids=BAD_TRACES.keys())
def test_traces_that_cannot_be_replayed(tmp_path: Path, name: str, written: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        trace.read(write(tmp_path / name, written))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "b64", "content", "shape"]), inner)
    ),
    max_leaves=8,
)
tensors = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "y"])}, optional={"shape": values, "datatype": values, "data": values}
)
documents = st.one_of(
    st.fixed_dictionaries({"data": st.lists(st.dictionaries(st.just("x"), values)) | values}, optional={
        "validation_data": st.lists(st.dictionaries(st.just("y"), values)) | values,
    }),
    st.fixed_dictionaries({"inputs": st.lists(tensors, max_size=2)}, optional={"at": values, "outputs": values}),
    values,
)  # fmt: skip
written = st.binary(max_size=200) | st.text(max_size=50).map(str.encode) | documents.map(json.dumps).map(str.encode)


@given(written, st.sampled_from([".npz", ".json", ".jsonl", ".txt", ".bin"]), st.sampled_from([X, OPEN, TEXT]))
@example(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999,), }", ".npz", X)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_file_makes_the_readers_raise_anything_else(
    tmp_path: Path, raw: bytes, ending: str, spec: TensorSpec
) -> None:
    path = tmp_path / f"d{ending}"
    path.write_bytes(raw)
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    for name in ("x", "x.npy", "one.npz", "one.jpg"):
        (folder / name).unlink(missing_ok=True)
    (folder / ["x", "x.npy", "one.npz", "one.jpg"][len(raw) % 4]).write_bytes(raw)
    renamed = TensorSpec("x", spec.dtype, spec.dims)
    for attempt in (
        lambda: take(path, renamed, outputs=(Y,)),
        lambda: take(folder, renamed, outputs=(Y,)),
        lambda: trace.read(path),
    ):
        try:
            attempt()
        except BadInput as error:
            assert str(tmp_path) in error.where


@given(st.binary(max_size=6), st.integers(0, 400), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_archive(tmp_path: Path, noise: bytes, at: int, cut: bool) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=GOOD)
    raw = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(raw[:at] + noise + (b"" if cut else raw[at + len(noise) :]))
    try:
        take(tmp_path / "d.npz", X)
    except BadInput as error:
        assert "d.npz" in error.where
