"""Package: a load as bytes, for a worker in another process or on another machine. No pickle."""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Any

import numpy as np

from loadtest.plan.data.answers import Answers
from loadtest.plan.load import Load
from loadtest.plan.plan import Plan
from loadtest.plan.traffic import Fresh, Part
from modelathe.tensors import Array, TensorSpec


def pack(load: Load) -> bytes:
    """Return an .npz archive: the arrays, strings packed, and one JSON document that says what they are."""
    arrays: list[Array] = []
    references = load.answers.references if load.answers else {}
    document = {
        "plan": asdict(load.plan),
        "parts": [
            {field.name: _put(getattr(part, field.name), arrays) for field in fields(part)} for part in load.parts
        ],
        "references": [[number, _put(right, arrays)] for number, right in references.items()],
    }
    stream = io.BytesIO()
    text = np.frombuffer(json.dumps(document).encode(), np.uint8)
    np.savez(stream, allow_pickle=False, document=text, **{str(place): array for place, array in enumerate(arrays)})
    return stream.getvalue()


def unpack(data: bytes) -> Load:
    """Return what `pack` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        document = json.loads(archive["document"].tobytes())
        arrays = {name: archive[name] for name in archive.files}
    parts = [Part(**{name: _take(value, arrays) for name, value in part.items()}) for part in document["parts"]]
    references = {number: tuple(_take(right, arrays)) for number, right in document["references"]}
    return Load(Plan.from_document(document["plan"]), parts, Answers(references) if references else None)


def _put(value: Any, arrays: list[Array]) -> Any:
    """Return `value` as JSON; its arrays go to `arrays`."""
    if isinstance(value, np.ndarray):
        texts = [
            text if isinstance(text, bytes) else str(text).encode() for text in value.flat if value.dtype == object
        ]
        strings = [value.shape, [len(text) for text in texts]] if value.dtype == object else None
        arrays.append(np.frombuffer(b"".join(texts), np.uint8) if strings else value)
        return {"array": len(arrays) - 1, "strings": strings}
    if isinstance(value, Fresh):
        return {"fresh": [[spec.document() for spec in value.specs], value.batch, value.seed]}
    if isinstance(value, Mapping):
        return {"items": [[key, _put(item, arrays)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_put(item, arrays) for item in value]
    return value


def _take(value: Any, arrays: Mapping[str, Array]) -> Any:
    """Return what `_put` was given."""
    if isinstance(value, list):
        return [_take(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "fresh" in value:
        specs, batch, seed = value["fresh"]
        return Fresh([TensorSpec.from_document(spec) for spec in specs], batch, seed)
    if "items" in value:
        return {key: _take(item, arrays) for key, item in value["items"]}
    array = arrays[str(value["array"])]
    return _split(array.tobytes(), *value["strings"]) if value["strings"] else array


def _split(joined: bytes, shape: list[int], lengths: list[int]) -> Array:
    ends = np.cumsum([0, *lengths])
    strings = np.empty(len(lengths), object)
    strings[:] = [joined[start:end] for start, end in pairwise(ends)]
    return strings.reshape(shape)
