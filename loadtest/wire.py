"""Wire: requests as bytes, made once before the run, and answers back as arrays.

KServe V2 with binary tensors, over HTTP and as gRPC messages.
"""

import json
from typing import Any

import numpy as np

from loadtest.results import Turn
from loadtest.tensors import NUMPY_DTYPES, TRITON_DTYPES, Array, Arrays


def http_request(host: str, model: str, inputs: Arrays, version: str = "", turn: Turn | None = None) -> bytes:
    """Return the whole HTTP/1.1 request, from `POST` to the last byte of the last tensor.

    Args:
        host: HOST:PORT.
        model: its name.
        inputs: by name.
        version: of the model; empty lets the server choose.
        turn: its place in a sequence.
    """
    tensors = {name: packed(array) for name, array in inputs.items()}
    body: dict[str, Any] = {
        "inputs": [
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": TRITON_DTYPES[array.dtype.name],
                "parameters": {"binary_data_size": len(tensors[name])},
            }
            for name, array in inputs.items()
        ],
        "parameters": {"binary_data_output": True} | _sequence(turn),
    }
    header = json.dumps(body, separators=(",", ":")).encode()
    length = len(header) + sum(map(len, tensors.values()))
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    start = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
        f"Inference-Header-Content-Length: {len(header)}\r\nContent-Length: {length}\r\n\r\n"
    )
    return b"".join([start.encode(), header, *tensors.values()])


def _sequence(turn: Turn | None) -> dict[str, int]:
    if turn is None:
        return {}
    return {"sequence_id": turn.id, "sequence_start": turn.start, "sequence_end": turn.end}


def http_outputs(header: bytes, raw: bytes) -> dict[str, Array]:
    """Return the outputs of an answer from its JSON header and the bytes behind it.

    Raises:
        ValueError, KeyError, TypeError: it is not the answer of a V2 server.
    """
    outputs, at = {}, 0
    for output in json.loads(header)["outputs"]:
        size = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = _array(output["datatype"], output["shape"], raw[at : at + size])
        at += size
    return outputs


def grpc_request(model: str, inputs: Arrays, version: str = "", turn: Turn | None = None) -> bytes:
    """Return the serialised `ModelInferRequest`."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    for key, value in _sequence(turn).items():
        if key == "sequence_id":
            request.parameters[key].int64_param = value
        else:
            request.parameters[key].bool_param = bool(value)
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=TRITON_DTYPES[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(packed(array))
    return bytes(request.SerializeToString())


def grpc_outputs(response: Any) -> dict[str, Array]:
    """Return the outputs of a `ModelInferResponse`.

    Raises:
        ValueError, KeyError: it is not the answer of a V2 server.
    """
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {output.name: _array(output.datatype, list(output.shape), raw) for output, raw in pairs}


def packed(array: Array) -> bytes:
    """Return the bytes of a binary tensor: little-endian values, row by row; strings each behind their length."""
    if array.dtype == object:
        from tritonclient.utils import serialize_byte_tensor

        packed = serialize_byte_tensor(array)
        return bytes(packed.item()) if packed.size else b""
    return np.ascontiguousarray(array).tobytes()


def _array(datatype: str, shape: list[int], raw: bytes) -> Array:
    if datatype == "BYTES":
        from tritonclient.utils import deserialize_bytes_tensor

        strings: Array = deserialize_bytes_tensor(raw)
        return strings.reshape(shape)
    return np.frombuffer(raw, NUMPY_DTYPES[datatype]).reshape(shape)
