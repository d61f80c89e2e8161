from pathlib import Path

import numpy as np
import pytest

from loadtest import payload
from loadtest.errors import BadInput, UsageError
from loadtest.tensors import BATCH, UNBOUNDED, Dim, TensorSpec

OPEN = Dim("ids_1", 1, 1, UNBOUNDED)
X = TensorSpec("x", "float32", (BATCH, 3), (-2.0, 2.0))
IDS = TensorSpec("ids", "int64", (BATCH, Dim("tokens", 1, 5, 9)), (0, 99))
UNBATCHED = TensorSpec("x", "float32", (3,))


def test_requests_differ_are_in_range_and_repeatable() -> None:
    requests = payload.generate([X, IDS], 16, seed=7, batch=4)
    assert len({request["x"].tobytes() for request in requests}) == 16
    assert len({request["ids"].tobytes() for request in requests}) == 16
    for request in requests:
        assert request["x"].shape == (4, 3)
        assert request["ids"].shape == (4, 5)
        assert request["ids"].dtype == np.int64
        assert np.abs(request["x"]).max() <= 2
        assert 0 <= request["ids"].min() <= request["ids"].max() <= 99
    again = payload.generate([X, IDS], 16, seed=7, batch=4)
    assert all(np.array_equal(one["x"], two["x"]) for one, two in zip(requests, again, strict=True))
    other = payload.generate([X, IDS], 16, seed=8, batch=4)
    assert not np.array_equal(requests[0]["x"], other[0]["x"])


def test_strings_differ_too() -> None:
    requests = payload.generate([TensorSpec("text", "object", (BATCH, 1))], 16, seed=0)
    assert len({request["text"].item() for request in requests}) > 1


def test_a_dim_of_unknown_size_names_the_option() -> None:
    spec = TensorSpec("ids", "int64", (BATCH, OPEN))
    with pytest.raises(UsageError, match="--shape ids:N"):
        payload.generate([spec], 1, 0)
    [known] = payload.with_shapes([spec], {"ids": (7,)})
    assert payload.generate([known], 1, 0, batch=2)[0]["ids"].shape == (2, 7)


@pytest.mark.parametrize("shapes", [{"nope": (1,)}, {"x": (3, 3)}, {"x": (4,)}, {"ids": (10,)}])
def test_a_shape_that_does_not_fit(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="--shape"):
        payload.with_shapes([X, IDS], shapes)


@pytest.mark.parametrize(("specs", "batch"), [([X], 0), ([X], 65), ([UNBATCHED], 2)])
def test_a_batch_that_the_model_does_not_take(specs: list[TensorSpec], batch: int) -> None:
    with pytest.raises(UsageError, match="batch of"):
        payload.generate(specs, 1, 0, batch)


def test_an_npz_is_cut_into_requests(tmp_path: Path) -> None:
    x, ids = np.arange(21, dtype=np.float32).reshape(7, 3), np.arange(35).reshape(7, 5)
    np.savez(tmp_path / "d.npz", x=x, ids=ids)
    requests = payload.load_npz(tmp_path / "d.npz", [X, IDS], batch=3)
    assert len(requests) == 2
    np.testing.assert_array_equal(requests[1]["x"], x[3:6])
    np.testing.assert_array_equal(requests[1]["ids"], ids[3:6])


def test_a_model_without_batch_axis_gets_single_samples(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "d.npz", x=x)
    requests = payload.load_npz(tmp_path / "d.npz", [UNBATCHED])
    assert [request["x"].tolist() for request in requests] == x.tolist()


def test_strings_of_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", text=np.array([["zwölf"], ["2"]]))
    requests = payload.load_npz(tmp_path / "d.npz", [TensorSpec("text", "object", (BATCH, 1))])
    assert requests[0]["text"].tolist() == [["zwölf".encode()]]


GOOD = np.zeros((4, 3), np.float32)
BAD_ARRAYS = {
    "missing": ({}, "inputs are x"),
    "misnamed": ({"y": GOOD}, "has the arrays y"),
    "extra": ({"x": GOOD, "y": GOOD}, "has the arrays x, y"),
    "dtype": ({"x": GOOD.astype(np.float64)}, "dtype float64"),
    "shape": ({"x": np.zeros((4, 5), np.float32)}, r"shape \[4, 5\]"),
    "rank": ({"x": np.zeros(3, np.float32)}, r"shape \[3\]"),
    "scalar": ({"x": np.float32(1)}, "shape"),
    "no samples": ({"x": GOOD[:0]}, "has 0 samples"),
    "nan": ({"x": np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)}, "sample 1"),
    "infinite": ({"x": np.array([[np.inf, 0, 0]], np.float32)}, "sample 0"),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_cannot_be_sent(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(BadInput, match=message) as caught:
        payload.load_npz(tmp_path / "d.npz", [X])
    assert "d.npz" in str(caught.value)


def test_arrays_of_different_lengths(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=GOOD, ids=np.zeros((5, 2), np.int64))
    with pytest.raises(BadInput, match="different numbers of samples"):
        payload.load_npz(tmp_path / "d.npz", [X, IDS])


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="Python objects"):
        payload.load_npz(tmp_path / "d.npz", [X])


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "one.npy", GOOD)
    for name in ("text.npz", "cut.npz", "empty.npz", "one.npy", "none.npz", "."):
        with pytest.raises(BadInput):
            payload.load_npz(tmp_path / name, [X])


def test_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "3"
    folder.mkdir(parents=True)
    with pytest.raises(BadInput, match=r"lineage\.json"):
        payload.from_lineage(tmp_path, "m", "3")
    for text in ("", "[]", "{}", '{"inputs": [{"name": "x"}]}'):
        (folder / "lineage.json").write_text(text)
        with pytest.raises(BadInput, match=r"lineage\.json"):
            payload.from_lineage(tmp_path, "m", "3")
