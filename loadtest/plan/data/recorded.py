"""Recorded traffic: JSON lines, each a V2 inference request with the model that it went to and the time.

As in `{"at": 0.25, "model": "digits", "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}`;
the data may be base64 too, `{"b64": …}`, and `outputs` of the same form are the right ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.plan.data import files, values
from loadtest.plan.data.request import Data, Request, Signature, finite
from modelathe.errors import BadInput, UsageError
from modelathe.tensors import TRITON_DTYPES, Array, TensorSpec

_FIX = 'write {"at": SECONDS, "model": NAME, "inputs": [{"name", "shape", "datatype", "data"}, ...]} on each line'


@dataclass(frozen=True)
class Line:
    """One line: its number in the file, the model (empty where it does not say), and what it holds."""

    number: int
    model: str
    document: dict[str, Any]


def lines(path: Path) -> list[Line]:
    """Return the requests of a recording, in its order.

    Raises:
        BadInput: the file cannot be read, a line is not JSON, or there is none.
    """
    found = []
    for number, written in enumerate(files.text(path, _FIX).split("\n"), 1):
        if written.strip():
            found.append(_line(path, number, files.from_json(path, number, written, _FIX)))
    if not found:
        raise BadInput("has no lines", where=str(path), fix=_FIX)
    return found


def _line(path: Path, number: int, document: Any) -> Line:
    where = files.place(path, number)
    if not isinstance(document, dict):
        raise BadInput("is no request", where=where, fix=_FIX)
    model = document.get("model", "")
    if not isinstance(model, str):
        raise BadInput(f"the model is {model!r:.40}", where=where, fix="write its name")
    return Line(number, model, document)


def holds_requests(path: Path) -> bool:
    """Whether a trace is a recording of requests, rather than of times alone."""
    return path.suffix == ".jsonl" and any("inputs" in line.document for line in lines(path))


def read(path: Path, signature: Signature, batch: int = 1, model: str = "") -> Data:
    """Return the requests of a recording that went to `model` or do not say where; all of them without a name.

    Raises:
        BadInput: a line cannot be used, or none is left; the message names it and the tensor.
        UsageError: a batch was asked of whole requests.
    """
    found = [line for line in lines(path) if model in ("", line.model) or not line.model]
    if not found:
        raise BadInput(f"has no request to {model}", where=str(path), fix="give the model's own recording")
    return requests(path, found, signature, batch)


def requests(path: Path, found: Sequence[Line], signature: Signature, batch: int = 1) -> Data:
    """Return the requests of these lines, which all go to one model."""
    if batch != 1:
        raise UsageError("each line of a recording is a whole request", fix="leave --batch away")
    return Data([_request(files.place(path, line.number), line.document, signature) for line in found])


def _request(where: str, document: dict[str, Any], signature: Signature) -> Request:
    inputs = _named(where, "inputs", document.get("inputs"))
    outputs = _named(where, "outputs", document.get("outputs", []))
    values.names(where, inputs, signature, outputs=False)
    values.names(where, {*inputs, *outputs}, signature)
    request = Request(
        {spec.name: _tensor(where, spec, inputs[spec.name]) for spec in signature.inputs if spec.name in inputs},
        {spec.name: _tensor(where, spec, outputs[spec.name]) for spec in signature.outputs if spec.name in outputs},
    )
    return finite(where, [request], signature)[0]


def _named(where: str, key: str, tensors: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(tensors, list) or not all(
        isinstance(tensor, dict) and isinstance(tensor.get("name"), str) for tensor in tensors
    ):
        raise BadInput(f'its "{key}" is no list of named tensors', where=where, fix=_FIX)
    return {tensor["name"]: tensor for tensor in tensors}


def _tensor(where: str, spec: TensorSpec, tensor: dict[str, Any]) -> Array:
    where = f"{where}: {spec.name}"
    datatype = tensor.get("datatype", TRITON_DTYPES[spec.dtype])
    if datatype != TRITON_DTYPES[spec.dtype]:
        raise BadInput(
            f"has the datatype {datatype!r:.40}, the model takes {TRITON_DTYPES[spec.dtype]}",
            where=where,
            fix="record it again, or convert it",
        )
    return values.from_json(where, spec, tensor.get("data"), tensor.get("shape"), full=True)
