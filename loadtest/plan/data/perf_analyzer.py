"""JSON in perf_analyzer's format, with its `validation_data` and its lists of sequences.

The format is that of docs/input_data.md in triton-inference-server/perf_analyzer: values are flat or nested lists or
base64, a `shape` beside the `content` where the model leaves sizes open, and no batch axis anywhere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.plan.data import files, values
from loadtest.plan.data.request import Data, Request, Signature, batched
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import Array, Arrays, TensorSpec

_FIX = 'write {"data": [{"INPUT": [1, 2, 3]}, ...]}'


def read(path: Path, signature: Signature, batch: int = 1) -> Data:
    """Return the samples of the file, cut into requests of `batch` samples; sequences stay whole.

    Raises:
        BadInput: the file cannot be used; the message names the entry and the tensor.
        UsageError: the model takes no batch of this size, or a batch was asked of sequences.
    """
    document = files.from_json(path, 0, files.text(path, _FIX), _FIX)
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise BadInput('has no list "data"', where=str(path), fix=_FIX)
    inputs = _streams(path, "data", document["data"])
    outputs = _streams(path, "validation_data", document.get("validation_data") or [])
    if not any(inputs):
        raise BadInput("has no request", where=str(path), fix=_FIX)
    if outputs and [len(stream) for stream in outputs] != [len(stream) for stream in inputs]:
        raise BadInput(
            '"validation_data" does not have an entry for each entry of "data"', where=str(path), fix="give as many"
        )
    right = [row for stream in outputs for _, row in stream]
    samples = [
        _request(place, row, right[n] if right else {}, signature)
        for n, (place, row) in enumerate(pair for stream in inputs for pair in stream)
    ]
    if not isinstance(document["data"][0], list):
        return Data(batched(str(path), samples, signature, batch))
    if batch != 1:
        raise UsageError("the data holds sequences, which are sent with a batch of 1", fix="leave --batch away")
    return Data(batched(str(path), samples, signature, 1), [len(stream) for stream in inputs if stream])


def _streams(path: Path, key: str, found: Any) -> list[list[tuple[str, Mapping[str, Any]]]]:
    """Return the entries of each sequence with their places; plain entries are one sequence."""
    if not isinstance(found, list):
        raise BadInput(f'"{key}" is no list', where=str(path), fix=_FIX)
    nested = bool(found) and isinstance(found[0], list)
    streams = found if nested else [found]
    for number, stream in enumerate(streams):
        if not isinstance(stream, list):
            raise BadInput(f"{key}[{number}] is no sequence, the first entry is", where=str(path), fix=_FIX)
    placed = [
        [(f"{path}: {key}[{number}][{n}]" if nested else f"{path}: {key}[{n}]", row) for n, row in enumerate(stream)]
        for number, stream in enumerate(streams)
    ]
    for place, row in (pair for stream in placed for pair in stream):
        if not isinstance(row, dict):
            raise BadInput("does not name its tensors", where=place, fix=_FIX)
    return placed if found else []


def _request(place: str, row: Mapping[str, Any], right: Mapping[str, Any], signature: Signature) -> Request:
    values.names(place, row, signature, outputs=False)
    if extra := set(right) - {spec.name for spec in signature.outputs}:
        raise BadInput(
            f"its validation_data has {', '.join(sorted(extra))}, which is no output of the model",
            where=place,
            fix=f"the outputs are {', '.join(spec.name for spec in signature.outputs)}",
        )
    return Request(_tensors(place, row, signature.inputs), _tensors(place, right, signature.outputs))


def _tensors(place: str, row: Mapping[str, Any], specs: Sequence[TensorSpec]) -> Arrays:
    return {spec.name: _tensor(f"{place}: {spec.name}", spec, row[spec.name]) for spec in specs if spec.name in row}


def _tensor(place: str, spec: TensorSpec, value: Any) -> Array:
    if isinstance(value, dict) and "content" in value:
        return values.from_json(place, spec, value["content"], value.get("shape"))
    return values.from_json(place, spec, value, None)
