import json
from pathlib import Path

import numpy as np
import pytest

from loadtest.plan.data import payload
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import BATCH, UNBOUNDED, Dim, TensorSpec

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


def test_lineage(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "3"
    folder.mkdir(parents=True)
    with pytest.raises(BadInput, match=r"lineage\.json"):
        payload.from_lineage(tmp_path, "m", "3")
    moved = [f'{{"inputs": [], "deviation": {one}}}' for one in ('"x"', "NaN", "Infinity", "-1", '{"y": NaN}', "[1]")]
    for text in ("", "[]", "{}", '{"inputs": [{"name": "x"}]}', *moved):
        (folder / "lineage.json").write_text(text)
        with pytest.raises(BadInput, match=r"lineage\.json"):
            payload.from_lineage(tmp_path, "m", "3")
    for deviation in (0.5, {"y": 0.5, "label": 0.0}, None):
        (folder / "lineage.json").write_text(json.dumps({"inputs": [], "deviation": deviation}))
        assert payload.from_lineage(tmp_path, "m", "3") == ([], deviation)
