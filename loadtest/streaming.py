"""Streaming: one question over `ModelStreamInfer`, whose answer may be several responses."""

import queue
from typing import Any

FINAL = "triton_final_response"
"""The parameter by which a server says whether a response is the last one of its request."""


def is_last(response: Any) -> bool:
    """Whether nothing follows this `ModelInferResponse`; a server that does not say it answers once."""
    return FINAL not in response.parameters or bool(response.parameters[FINAL].bool_param)


def ask(client: Any, timeout: float, headers: dict[str, str] | None, compression: str | None, **request: Any) -> Any:
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
