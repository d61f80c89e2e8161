"""KServe V2 over HTTP: requests as the stub's answers know them, and answers as JSON with binary tensors."""

import asyncio
import json
import math
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import numpy as np
from aiohttp import web

from modelathe.commandline import version as modelathe_version
from modelathe.tensors import NUMPY_DTYPES, TRITON_DTYPES, Array, packed
from serve.clients.standin import answers
from serve.clients.standin.answers import Counts, Given, Refused, Stub
from serve.repository.interface import Interface

HEADER_LENGTH = "Inference-Header-Content-Length"
STUB = web.AppKey("stub", Stub)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
WORDS = {str: "string", list: "array", dict: "object", bool: "boolean", int: "unsigned-integer"}
"""How the server calls what it wanted to read."""


def application(stub: Stub) -> web.Application:
    """Return the application that answers for `stub`."""
    app = web.Application(client_max_size=0, middlewares=[_in_json])
    app[STUB] = stub

    def get(path: str, handler: Handler) -> None:
        app.router.add_get(path, handler, allow_head=False)

    get("/v2", _server)
    get("/v2/health/{question:live|ready}", _healthy)
    get("/v2/models/stats", _statistics)
    app.router.add_post("/v2/repository/index", _index)
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version:[0-9]+}"):
        get(path, _metadata)
        get(f"{path}/config", _config)
        get(f"{path}/ready", _ready)
        get(f"{path}/stats", _statistics)
        app.router.add_post(f"{path}/infer", _infer)
    return app


@web.middleware
async def _in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer refusals, and paths and methods that there are not, as the server does."""
    try:
        return await handler(request)
    except Refused as refused:
        return web.json_response({"error": str(refused)}, status=refused.status)
    except web.HTTPException as error:
        return web.json_response({"error": error.reason}, status=error.status)


def _asked(request: web.Request) -> tuple[Stub, str, str]:
    return request.app[STUB], request.match_info.get("model", ""), request.match_info.get("version", "")


async def _healthy(_request: web.Request) -> web.Response:
    return web.Response()


async def _server(_request: web.Request) -> web.Response:
    return web.json_response({"name": answers.NAME, "version": modelathe_version(), "extensions": answers.EXTENSIONS})


async def _index(request: web.Request) -> web.Response:
    return web.json_response(request.app[STUB].index())


async def _metadata(request: web.Request) -> web.Response:
    stub, model, version = _asked(request)
    found = stub.find(model, version)
    return web.json_response(answers.metadata(found, [found.number] if version else sorted(stub.models[model])))


async def _config(request: web.Request) -> web.Response:
    stub, model, version = _asked(request)
    return web.json_response(_message(stub.find(model, version).config))


async def _ready(request: web.Request) -> web.Response:
    stub, model, version = _asked(request)
    if not stub.ready(model, version):
        raise Refused(400, "Model version not ready")
    return web.Response()


async def _statistics(request: web.Request) -> web.Response:
    stub, model, version = _asked(request)
    chosen = [(one, stub.counts.get((one.model, one.number), Counts())) for one in stub.chosen(model, version)]
    found = [
        {
            "name": one.model,
            "version": str(one.number),
            "inference_count": counts.samples,
            "execution_count": counts.success,
            "inference_stats": {
                "success": {"count": counts.success, "ns": round(counts.success * stub.latency * 1e9)},
                "fail": {"count": counts.fail, "ns": 0},
            },
        }
        for one, counts in chosen
    ]
    return web.json_response({"model_stats": found})


async def _infer(request: web.Request) -> web.Response:
    stub, model, version = _asked(request)
    found = stub.find(model, version)
    body = _decompressed(await request.read(), request.headers.get("Content-Encoding", "identity"))
    header, raw = _split(body, request.headers.get(HEADER_LENGTH))
    parameters, at = _request_parameters(header), 0
    binary, inputs = parameters.get("binary_data_output", False), []
    for document in _documents(header, "inputs"):
        tensor, length = _input(document, raw[at:], model)
        at += length
        inputs.append(tensor)
    if at < len(raw):
        raise Refused(400, f"unexpected additional input data for model '{model}'")
    flags = {_field(output, "name", str): _wants_binary(output) for output in _documents(header, "outputs", [])}
    identity = {"id": _field(header, "id", str)} if "id" in header else {}
    result = stub.infer(found, inputs, list(flags), parameters)
    await asyncio.sleep(stub.latency)
    return _answer(found, identity, result, {name: flags.get(name, binary) for name in result})


def _decompressed(body: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refused(501, "Unsupported compression type")
    try:
        # Beyond the largest window, 32 tells zlib to find out by itself which of the two it is.
        return zlib.decompress(body, zlib.MAX_WBITS + 32)
    except zlib.error as error:
        raise Refused(400, f"failed to decompress the request: {error}") from None


def _split(body: bytes, stated: str | None) -> tuple[dict[str, Any], bytes]:
    """Return the JSON document of a request and the bytes behind it."""
    length = len(body)
    if stated is not None:
        length = int(stated) if stated.strip().lstrip("-").isdecimal() else 0
    if not 0 <= length <= len(body):
        raise Refused(400, f"inference header size should be in range (0, {len(body)}), got: {length}")
    if not length:
        raise Refused(400, "input byte size mismatch for input 'raw_input': the stub takes no request without a header")
    try:
        document = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise Refused(500, f"failed to parse the request JSON buffer: {error}") from None
    return document if isinstance(document, dict) else {}, body[length:]


def _field(document: dict[str, Any], name: str, kind: type, *default: Any) -> Any:
    """Return a member of a JSON object.

    Raises:
        Refused: it is not there and has no default, or is not of this kind.
    """
    if name not in document and default:
        return default[0]
    if name not in document:
        raise Refused(500, f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    value: Any = document[name]
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise Refused(500, f"Unable to parse '{name}': attempt to access JSON non-{WORDS[kind]} as {WORDS[kind]}")
    return value


def _documents(header: dict[str, Any], name: str, *default: Any) -> list[dict[str, Any]]:
    return [entry if isinstance(entry, dict) else {} for entry in _field(header, name, list, *default)]


def _parameters(header: dict[str, Any]) -> dict[str, Any]:
    parameters = header.get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refused(500, "failed to get request params.: attempt to get members for non-object")
    return parameters


def _request_parameters(header: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(header)
    for name in ("binary_data_output", "sequence_start", "sequence_end"):
        _field(parameters, name, bool, False)
    sequence: Any = parameters.get("sequence_id", 0)
    if type(sequence) is not int or sequence < 0:
        _field(parameters, "sequence_id", str)
    for name, value in parameters.items():
        if not isinstance(value, int | str):
            raise Refused(400, f"parameter '{name}' has invalid type. It should be either 'int', 'bool', or 'string'.")
    return parameters


def _input(document: dict[str, Any], raw: bytes, model: str) -> tuple[Given, int]:
    """Return an input and how many of the bytes behind the header are its own."""
    parameters = document.get("parameters")
    stated = parameters if isinstance(parameters, dict) else {}
    if "shared_memory_region" in stated:
        raise Refused(404, f"Unable to find shared memory region: '{stated['shared_memory_region']}'")
    if ("data" in document) == ("binary_data_size" in stated):
        fields = "both are" if "data" in document else "no field is"
        raise Refused(
            400,
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {fields} set",
        )
    name, datatype = _field(document, "name", str), _field(document, "datatype", str)
    shape = tuple(_field({"shape": size}, "shape", int) for size in _field(document, "shape", list))
    if datatype not in NUMPY_DTYPES:
        raise Refused(400, f"invalid datatype for input {name}")
    if "data" in document:
        count = _count(_field(document, "data", list), name, datatype)
        if datatype == "BYTES":
            return Given(name, datatype, shape, count), 0
        if shape and count != math.prod(shape):
            raise Refused(500, "Unable to parse 'data': Shape does not match true shape of 'data' field")
        return Given(name, datatype, shape, count * np.dtype(NUMPY_DTYPES[datatype]).itemsize), 0
    length = _field(stated, "binary_data_size", int)
    if length > len(raw):
        missing = length - len(raw)
        raise Refused(
            400, f"unexpected size for input '{name}', expecting {missing} additional bytes for model '{model}'"
        )
    return Given(name, datatype, shape, answers.size(raw[:length], datatype)), length


def _count(data: list[Any], name: str, datatype: str) -> int:
    """Return how many values JSON data have, nested or not, once each is of the right kind."""
    if datatype == "FP16":
        raise Refused(
            400,
            f"receiving FP16 data via JSON is not supported. Please use the binary data format for input {name}",
        )
    values = list(_leaves(data))
    fits, kind = _kind(datatype)
    if not all(map(fits, values)):
        start = "Unable to parse JSON bytes array" if datatype == "BYTES" else "Unable to parse 'data'"
        raise Refused(500, f"{start}: attempt to access JSON non-{kind.partition(' ')[0]} as {kind.split()[-1]}")
    return len(values)


def _kind(datatype: str) -> tuple[Callable[[Any], bool], str]:
    """Return what a JSON value of this datatype must be, and what the server calls it when it is not."""
    if datatype == "BOOL":
        return lambda value: type(value) is bool, "boolean"
    if datatype == "BYTES":
        return lambda value: type(value) is str, "string"
    if datatype.startswith("FP"):
        return lambda value: type(value) in (int, float), "number double"
    if datatype.startswith("U"):
        return lambda value: type(value) is int and 0 <= value < 2**64, "unsigned-integer"
    return lambda value: type(value) is int and -(2**63) <= value < 2**63, "signed-integer"


def _leaves(data: list[Any]) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list):
            yield from _leaves(value)
        else:
            yield value


def _wants_binary(output: dict[str, Any]) -> bool:
    parameters = _parameters(output)
    if "classification" in parameters:
        raise Refused(400, "the stub does not classify: it has no labels and no scores")
    return bool(_field(parameters, "binary_data", bool, False))


def _answer(
    asked: Interface, identity: dict[str, str], result: dict[str, Array], binary: dict[str, bool]
) -> web.Response:
    outputs, parts = [], []
    for name, array in result.items():
        datatype = TRITON_DTYPES[array.dtype.name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary[name]:
            parts.append(packed(array))
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        elif datatype == "FP16":
            raise Refused(
                400, "sending FP16 data via JSON is not supported. Please use the binary data format for output"
            )
        else:
            output["data"] = [value.decode() if isinstance(value, bytes) else value for value in array.ravel().tolist()]
        outputs.append(output)
    document = {**identity, "model_name": asked.model, "model_version": str(asked.number), "outputs": outputs}
    if not parts:
        return web.json_response(document)
    header = json.dumps(document).encode()
    return web.Response(
        body=b"".join([header, *parts]),
        content_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )


def _message(message: Any) -> dict[str, Any]:
    """Return a protobuf message as the server writes it: numbers as numbers, defaults written out."""
    found: dict[str, Any] = {}
    for entry in message.DESCRIPTOR.fields:
        value = getattr(message, entry.name)
        if entry.message_type is not None and entry.message_type.GetOptions().map_entry:
            held = entry.message_type.fields_by_name["value"]
            found[entry.name] = {str(key): _value(held, value[key]) for key in sorted(value)}
        elif isinstance(value, (str, bytes, bool, int, float)) or hasattr(value, "DESCRIPTOR"):
            if not entry.has_presence or message.HasField(entry.name):
                found[entry.name] = _value(entry, value)
        else:
            found[entry.name] = [_value(entry, one) for one in value]
    return found


def _value(entry: Any, value: Any) -> Any:
    if entry.message_type is not None:
        return _message(value)
    return entry.enum_type.values_by_number[value].name if entry.enum_type is not None else cast(Any, value)
