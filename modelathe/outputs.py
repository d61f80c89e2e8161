"""Outputs: named arrays from the gRPC messages that a V2 server answers with, one or, over a stream, several."""

import queue
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelathe.tensors import NUMPY_DTYPES, Array, unpacked

FINAL = "triton_final_response"
"""The parameter by which a server says whether a response is the last one of its request."""
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""By Triton's type: the field of a gRPC tensor that holds its values where they do not come raw."""


def grpc_outputs(response: Any) -> dict[str, Array]:
    """Return the outputs of a `ModelInferResponse`, from its raw contents or each tensor's own.

    Raises:
        ValueError, KeyError: it is not the answer of a V2 server.
    """
    if not response.raw_output_contents:
        return {output.name: _from_contents(output) for output in response.outputs}
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    return {output.name: unpacked(output.datatype, list(output.shape), raw) for output, raw in pairs}


def stream_outputs(responses: Sequence[Any]) -> dict[str, Array]:
    """Return the outputs of all responses to one request; those of the second are named as in `y #2`.

    Raises:
        ValueError, KeyError: one is not the answer of a V2 server.
    """
    found: dict[str, Array] = {}
    for number, response in enumerate(responses, 1):
        outputs = grpc_outputs(response)
        found |= {f"{name} #{number}" if number > 1 else name: array for name, array in outputs.items()}
    return found


def _from_contents(output: Any) -> Array:
    values = list(getattr(output.contents, CONTENTS[output.datatype]))
    array = np.empty(len(values), NUMPY_DTYPES[output.datatype])
    array[:] = values
    return array.reshape(list(output.shape))


def is_last(response: Any) -> bool:
    """Whether nothing follows this `ModelInferResponse`; a server that does not say it answers once."""
    return FINAL not in response.parameters or bool(response.parameters[FINAL].bool_param)


def ask_stream(
    client: Any, timeout: float, headers: dict[str, str] | None, compression: str | None, **request: Any
) -> Any:
    """Return all responses with outputs to one request, in their order.

    Args:
        client: of tritonclient's gRPC.
        timeout: seconds for all of them.
        headers: that go with the stream.
        compression: of the requests.
        request: as tritonclient's `async_stream_infer` takes it.

    Raises:
        TimeoutError: not all came in time.
        InferenceServerException: the server says that something is wrong.
    """
    from tritonclient.utils import InferenceServerException

    came: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.start_stream(
        lambda result, error: came.put((result, error)), headers=headers, compression_algorithm=compression
    )
    found = []
    try:
        try:
            client.async_stream_infer(request_id="1", enable_empty_final_response=True, **request)
        except InferenceServerException:  # the stream ended before; what was wrong with it comes as an answer
            raise came.get(timeout=timeout)[1] from None
        while True:
            result, error = came.get(timeout=timeout)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                found.append(response)
            if is_last(response):
                return found
    except queue.Empty:
        raise TimeoutError from None
    finally:
        client.stop_stream(cancel_requests=True)
