"""Models of many kinds, published to one repository: what clients and stand-ins must get right."""

from pathlib import Path

import numpy as np

from modelathe.tensors import BATCH, Dim, TensorSpec
from serve.config import settings
from serve.config.target import Target
from serve.repository import staging
from serve.repository.source import Source
from tests.conftest import TINY, TINY_INPUTS, TINY_OUTPUTS, save_tiny
from tests.serve.backends.test_backend import save

TOKENS = Dim("tokens", 1, 20, 128)
TABLE = np.arange(60, dtype=np.float32).reshape(30, 2)
BUCKETS = {"tokens": [16, 32, 128]}
ODD = 'it\'s "a" $(x) `y`\\ {z}'
"""A name that would break a careless quotation."""


def publish(place: Path, model: str, onnx: Path, inputs, outputs, asked=None) -> None:
    made = settings.read(asked or {}, model)
    with staging.stage(place, model, Source(onnx, inputs, outputs), Target(cores=1), made) as staged:
        staging.publish(staged, {})


def publish_kinds(place: Path, onnx: Path) -> Path:
    """Publish them; `onnx` is overwritten for each."""
    from onnx import TensorProto as T

    def spec(name: str, dtype: str, *dims: int | Dim, values: tuple[float, float] | None = None) -> TensorSpec:
        return TensorSpec(name, dtype, dims, values)

    save(
        onnx,
        [("Gather", ["table", "ids"], ["rows"]), ("Cast", ["mask"], ["seen"], {"to": T.FLOAT})],
        [("ids", T.INT64, ["batch", "tokens"]), ("mask", T.INT64, ["batch", "tokens"])],
        [("rows", T.FLOAT, ["batch", "tokens", 2]), ("seen", T.FLOAT, ["batch", "tokens"])],
        [("table", TABLE)],
    )
    ids = spec("ids", "int64", BATCH, TOKENS, values=(5, 29)), spec("mask", "int64", BATCH, TOKENS, values=(1, 1))
    rows = spec("rows", "float32", BATCH, TOKENS, 2), spec("seen", "float32", BATCH, TOKENS)
    publish(place, "tokens", onnx, ids, rows, {"buckets": BUCKETS})
    publish(place, "tokens_free", onnx, ids, rows)
    # Names that would break a careless quotation.
    odd, same = 'it\'s "a" $(x) `y`\\ {z}', "class"
    save(onnx, [("Identity", [odd], [same])], [(odd, T.STRING, ["batch", 2])], [(same, T.STRING, ["batch", 2])])
    publish(place, "1-odd.strings", onnx, [spec(odd, "object", BATCH, 2)], [spec(same, "object", BATCH, 2)])
    save(
        onnx,
        [("Cast", ["a"], ["half"], {"to": T.FLOAT16}), ("Not", ["b"], ["not_b"])],
        [("a", T.DOUBLE, ["batch", 1]), ("b", T.BOOL, ["batch", 1])],
        [("half", T.FLOAT16, ["batch", 1]), ("not_b", T.BOOL, ["batch", 1])],
    )
    pair = spec("a", "float64", BATCH, 1), spec("b", "bool", BATCH, 1)
    publish(place, "pair", onnx, pair, [spec("half", "float16", BATCH, 1), spec("not_b", "bool", BATCH, 1)])
    save(onnx, [("Neg", ["h"], ["minus"])], [("h", T.FLOAT16, ["batch", 3])], [("minus", T.FLOAT16, ["batch", 3])])
    publish(place, "halves", onnx, [spec("h", "float16", BATCH, 3)], [spec("minus", "float16", BATCH, 3)])
    save(
        onnx,
        [("ReduceSum", ["numbers"], ["total"], {"keepdims": 1})],
        [("numbers", T.FLOAT, ["count"])],
        [("total", T.FLOAT, [1])],
    )
    publish(
        place, "unbatched", onnx, [spec("numbers", "float32", Dim("count", 1, 3, 8))], [spec("total", "float32", 1)]
    )
    save(
        onnx,
        [("Add", ["x", "sum"], ["total"]), ("Identity", ["total"], ["y"])],
        [("x", T.FLOAT, ["batch", 1]), ("sum", T.FLOAT, ["batch", 1])],
        [("y", T.FLOAT, ["batch", 1]), ("total", T.FLOAT, ["batch", 1])],
    )
    x, y = spec("x", "float32", BATCH, 1), spec("y", "float32", BATCH, 1)
    remembered = spec("sum", "float32", BATCH, 1), spec("total", "float32", BATCH, 1)
    publish(place, "sums", onnx, [x, remembered[0]], [y, remembered[1]], {"sequence": {"state": {"sum": "total"}}})
    publish(place, TINY, save_tiny(onnx), TINY_INPUTS, TINY_OUTPUTS)
    return place
