"""Wire: requests as bytes, made once before the run, and answers back as arrays.

KServe V2 over HTTP, with binary tensors or JSON, and as gRPC messages.
"""

import gzip
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from loadtest.plan.data import values
from loadtest.record.results import Turn, parsed
from modelathe.connection import PLAIN, Connection
from modelathe.errors import BadInput
from modelathe.tensors import NUMPY_DTYPES, TRITON_DTYPES, Array, Arrays, TensorSpec, packed, unpacked

NO_OUTPUTS = "an answer without outputs"
_WIDTHS = {triton: np.dtype(numpy).itemsize for triton, numpy in NUMPY_DTYPES.items() if triton != "BYTES"}
_STRING_LENGTH = 4
"""Bytes that say how long the string behind them is."""


class Place(NamedTuple):
    """Where a tensor lies in shared memory: its name, Triton's type, its shape, and `size` bytes from `offset`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    region: str
    offset: int
    size: int

    def parameters(self) -> dict[str, Any]:
        """Return what the protocol says of it."""
        found = {"shared_memory_region": self.region, "shared_memory_byte_size": self.size}
        return found | ({"shared_memory_offset": self.offset} if self.offset else {})


@dataclass(frozen=True)
class HttpRequests:
    """Writes whole HTTP/1.1 requests to one server, from `POST` to the last byte of the last tensor.

    Args:
        host: HOST:PORT.
        connection: its headers, its compression, and whether it takes binary tensors.
        base: the path below which the server has its own.
    """

    host: str
    connection: Connection = PLAIN
    base: str = ""

    def request(self, model: str, inputs: Arrays, version: str = "", turn: Turn | None = None) -> bytes:
        """Return a request that carries its tensors.

        Args:
            model: its name.
            inputs: by name.
            version: of the model; empty lets the server choose.
            turn: its place in a sequence.

        Raises:
            BadInput: JSON cannot hold a value: NaN, infinity, or bytes that are no text.
        """
        path = _path(model, version)
        if not self.connection.binary:
            return self._whole(path, _json_body(inputs) | _told(turn), None)
        tensors = [packed(array) for array in inputs.values()]
        described = [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": TRITON_DTYPES[array.dtype.name],
                "parameters": {"binary_data_size": len(tensor)},
            }
            for (name, array), tensor in zip(inputs.items(), tensors, strict=True)
        ]
        body = {"inputs": described, "parameters": {"binary_data_output": True} | _sequence(turn)}
        return self._whole(path, body, tensors)

    def shared_request(
        self,
        model: str,
        inputs: Sequence[Place],
        outputs: Sequence[Place],
        version: str = "",
        turn: Turn | None = None,
    ) -> bytes:
        """Return a request whose tensors lie in shared memory."""
        described = [
            {"name": place.name, "shape": place.shape, "datatype": place.datatype, "parameters": place.parameters()}
            for place in inputs
        ]
        wanted = [{"name": place.name, "parameters": place.parameters()} for place in outputs]
        body = {"inputs": described, "outputs": wanted, "parameters": _sequence(turn)}
        return self._whole(_path(model, version), body, [])

    def _whole(self, path: str, body: dict[str, Any], tensors: Sequence[bytes] | None) -> bytes:
        """Return the request with this JSON; without `tensors` it is nothing but JSON."""
        connection = self.connection
        header = json.dumps(body, separators=(",", ":")).encode()
        content, fields = b"".join([header, *(tensors or ())]), [*connection.others]
        if connection.compression:
            content = gzip.compress(content) if connection.compression == "gzip" else zlib.compress(content)
            fields += [("Content-Encoding", connection.compression), ("Accept-Encoding", connection.compression)]
        more = "".join(f"{name}: {value}\r\n" for name, value in fields)
        kind = "application/json\r\n"
        if tensors is not None:
            kind = f"application/octet-stream\r\nInference-Header-Content-Length: {len(header)}\r\n"
        start = f"POST {self.base}{path} HTTP/1.1\r\nHost: {connection.host or self.host}\r\nContent-Type: {kind}{more}"
        return f"{start}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _path(model: str, version: str) -> str:
    return f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"


def _json_body(inputs: Arrays) -> dict[str, Any]:
    return {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": TRITON_DTYPES[array.dtype.name],
                "data": _listed(name, array),
            }
            for name, array in inputs.items()
        ]
    }


def _listed(name: str, array: Array) -> list[Any]:
    """Return the values as JSON holds them, row by row."""
    flat = array.ravel().tolist()
    try:
        flat = [value.decode() if isinstance(value, bytes) else value for value in flat]
        json.dumps(flat, allow_nan=False)
    except ValueError as error:
        fix = "give other values: the server takes JSON only, not tensors as bytes"
        raise BadInput(f"the input {name!r} cannot be written as JSON: {error}", fix=fix) from error
    return flat


def _told(turn: Turn | None) -> dict[str, Any]:
    return {"parameters": _sequence(turn)} if turn else {}


def _sequence(turn: Turn | None) -> dict[str, Any]:
    if turn is None:
        return {}
    return {"sequence_id": turn.id, "sequence_start": turn.start, "sequence_end": turn.end}


def http_missing(header: bytes, raw: bytes, elsewhere: bool = False) -> str:
    """Return why an answer is not a whole one, by its JSON and the bytes behind it; empty if it is.

    Args:
        header: the JSON.
        raw: the bytes behind it.
        elsewhere: the values were asked for in shared memory, so that the answer describes the outputs alone.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not the answer of a V2 server.
    """
    outputs = parsed(header).get("outputs")
    if not outputs:
        return NO_OUTPUTS
    if elsewhere:
        return "" if not raw else f"{len(raw)} bytes of outputs that were asked for in shared memory"
    sizes = [output.get("parameters", {}).get("binary_data_size") for output in outputs]
    if (described := sum(size or 0 for size in sizes)) != len(raw):
        return f"{len(raw)} bytes of outputs, {described} are described"
    at = 0
    for output, size in zip(outputs, sizes, strict=True):
        part = None if size is None else raw[at : at + size]
        held = _leaves(output.get("data", [])) if part is None else 0
        if text := _unfilled(output["name"], output["datatype"], output["shape"], held, part):
            return text
        at += size or 0
    return ""


def grpc_missing(responses: Sequence[Any], elsewhere: bool = False) -> str:
    """Return why the `ModelInferResponse`s to one request are not a whole answer; empty if they are.

    `elsewhere` as in `http_missing`.
    """
    if not any(response.outputs for response in responses):
        return NO_OUTPUTS
    for response in () if elsewhere else responses:
        raw, named = response.raw_output_contents, response.outputs
        if raw and len(raw) != len(named):
            return f"the bytes of {len(raw)} outputs, {len(named)} are described"
        for number, output in enumerate(named):
            part = raw[number] if raw else None
            held = 0 if raw else max((len(values) for _, values in output.contents.ListFields()), default=0)
            if text := _unfilled(output.name, output.datatype, output.shape, held, part):
                return text
    return ""


def _leaves(data: Any) -> int:
    """Return how many values JSON lists hold, however deep."""
    if not isinstance(data, list):
        return 1
    return sum(map(_leaves, data)) if data and isinstance(data[0], list) else len(data)


def _unfilled(name: str, datatype: str, shape: Sequence[int], held: int, raw: bytes | None) -> str:
    """Return why values are not a tensor of this shape: `held` of them, or those in the bytes; empty if they are."""
    described = math.prod(shape)
    if raw is None:
        return "" if held == described else f"the output {name!r} has {held:,} values, {described:,} are described"
    if datatype == "BYTES":
        whole = _strings(raw) == described
    elif datatype in _WIDTHS:
        whole = len(raw) == described * _WIDTHS[datatype]
    else:  # a type that this client cannot read; a value takes a byte at least
        whole = len(raw) >= described
    return "" if whole else f"the output {name!r} has {len(raw):,} bytes, too few or too many for {described:,} values"


def _strings(raw: bytes) -> int:
    """Return how many strings the bytes hold, each behind its length; -1 where the lengths do not add up."""
    count = at = 0
    while at < len(raw):
        at += _STRING_LENGTH + int.from_bytes(raw[at : at + _STRING_LENGTH], "little")
        count += 1
    return count if at == len(raw) else -1


def http_outputs(header: bytes, raw: bytes) -> dict[str, Array]:
    """Return the outputs of an answer from its JSON and the bytes behind it; each may be in the one or the other.

    Raises:
        ValueError, KeyError, TypeError, BadInput: it is not the answer of a V2 server.
    """
    outputs, at = {}, 0
    for output in json.loads(header)["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            outputs[output["name"]] = _from_json(output)
            continue
        outputs[output["name"]] = unpacked(output["datatype"], output["shape"], raw[at : at + size])
        at += size
    if at != len(raw):
        raise ValueError(f"{len(raw)} bytes of outputs, {at} are described")
    return outputs


def _from_json(output: dict[str, Any]) -> Array:
    spec = TensorSpec(output["name"], NUMPY_DTYPES[output["datatype"]], tuple(output["shape"]))
    return values.from_json(spec.name, spec, output["data"], output["shape"], full=True)


def grpc_request(model: str, inputs: Arrays, version: str = "", turn: Turn | None = None) -> bytes:
    """Return the serialised `ModelInferRequest`."""
    request = _grpc(model, version, turn)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=TRITON_DTYPES[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(packed(array))
    return bytes(request.SerializeToString())


def grpc_shared_request(
    model: str, inputs: Sequence[Place], outputs: Sequence[Place], version: str = "", turn: Turn | None = None
) -> bytes:
    """Return the serialised `ModelInferRequest` whose tensors lie in shared memory."""
    request = _grpc(model, version, turn)
    for place in inputs:
        _fill(request.inputs.add(name=place.name, datatype=place.datatype, shape=place.shape), place.parameters())
    for place in outputs:
        _fill(request.outputs.add(name=place.name), place.parameters())
    return bytes(request.SerializeToString())


def _grpc(model: str, version: str, turn: Turn | None) -> Any:
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    _fill(request, _sequence(turn))
    return request


def _fill(message: Any, parameters: dict[str, Any]) -> None:
    for key, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(message.parameters[key], kind, value)
