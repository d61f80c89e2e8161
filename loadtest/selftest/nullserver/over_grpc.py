"""Over gRPC: the calls that a load run makes; inferences pass as bytes in and out."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from typing import Any

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2

from loadtest.selftest.nullserver.model import MODEL, Model

SERVICE = "inference.GRPCInferenceService"


def handlers(model: Model) -> Any:
    """Return the generic handler for a `grpc.aio` server."""
    known: dict[str, Callable[[], dict[str, Any]]] = {
        "ServerLive": lambda: {"live": True},
        "ServerReady": lambda: {"ready": True},
        "ModelReady": lambda: {"ready": True},
        "ServerMetadata": lambda: {"name": "null server", "version": "1"},
        "RepositoryIndex": lambda: {"models": [{"name": MODEL, "version": "1", "state": "READY"}]},
        "ModelMetadata": model.metadata,
        "ModelConfig": lambda: {"config": model_config_pb2.ModelConfig(**model.config())},
        "ModelStatistics": model.statistics,
    }
    calls = {name: _question(name, values) for name, values in known.items()}
    inferences = _Inferences(model)
    calls["ModelInfer"] = grpc.unary_unary_rpc_method_handler(inferences.unary)
    calls["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(inferences.stream)
    return grpc.method_handlers_generic_handler(SERVICE, calls)


def _question(name: str, values: Callable[[], dict[str, Any]]) -> Any:
    async def respond(request: Any, context: Any) -> Any:
        if getattr(request, "name", "") not in ("", MODEL):
            await context.abort(grpc.StatusCode.NOT_FOUND, _unknown(request.name))
        return getattr(service_pb2, f"{name}Response")(**values())

    read = getattr(service_pb2, f"{name}Request").FromString
    return grpc.unary_unary_rpc_method_handler(respond, read, lambda message: message.SerializeToString())


def _unknown(name: str) -> str:
    return f"Request for unknown model: '{name}' is not found"


class _Inferences:
    def __init__(self, model: Model) -> None:
        self.model = model
        self._answer = lru_cache(maxsize=256)(model.answer)

    async def unary(self, data: bytes, context: Any) -> bytes:
        try:
            response, due = self._infer(data)
        except LookupError as error:
            return bytes(await context.abort(grpc.StatusCode.NOT_FOUND, str(error)))
        if due:
            await asyncio.sleep(due - time.monotonic())
        return bytes(response.SerializeToString())

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        # gRPC takes one message after the other.
        loop, waiting, one_by_one = asyncio.get_running_loop(), set(), asyncio.Lock()

        async def write(answer: bytes) -> None:
            async with one_by_one:
                await context.write(answer)

        async def later(answer: bytes, due: float) -> None:
            await asyncio.sleep(due - time.monotonic())
            await write(answer)

        async for data in requests:
            answer, due = self._message(data)
            if due:
                task = loop.create_task(later(answer, due))
                waiting.add(task)
                task.add_done_callback(waiting.discard)
            else:
                await write(answer)
        await asyncio.gather(*waiting)

    def _message(self, data: bytes) -> tuple[bytes, float]:
        try:
            response, due = self._infer(data)
            message = service_pb2.ModelStreamInferResponse(infer_response=response)
        except LookupError as error:
            message, due = service_pb2.ModelStreamInferResponse(error_message=str(error)), 0.0
        return bytes(message.SerializeToString()), due

    def _infer(self, data: bytes) -> tuple[Any, float]:
        """Return the answer and when it is due (0 for at once); LookupError for another model."""
        request = service_pb2.ModelInferRequest.FromString(data)
        if request.model_name != MODEL:
            raise LookupError(_unknown(request.model_name))
        batch = self.model.batch(request.inputs[0].shape)
        outputs, raw = self._answer(batch)
        response = service_pb2.ModelInferResponse(
            model_name=MODEL, model_version="1", id=request.id, outputs=outputs, raw_output_contents=raw
        )
        return response, self.model.queue.due(batch)
