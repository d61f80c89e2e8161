"""KServe V2 over gRPC: the methods that applications call, as handlers of a gRPC server."""

import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from modelathe.commandline import version as modelathe_version
from modelathe.outputs import CONTENTS
from modelathe.tensors import NUMPY_DTYPES, TRITON_DTYPES, packed
from serve.clients.standin import answers
from serve.clients.standin.answers import Counts, Given, Refused, Stub

SERVICE = "inference.GRPCInferenceService"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    500: grpc.StatusCode.INTERNAL,
}


def handler(stub: Stub) -> Any:
    """Return the handler of all methods that the stub has; a server calls the others unimplemented."""

    def metadata(request: Any) -> Any:
        found = stub.find(request.name, request.version)
        numbers = [found.number] if request.version else sorted(stub.models[request.name])
        return messages.ModelMetadataResponse(**answers.metadata(found, numbers))

    methods: dict[str, Callable[[Any], Any]] = {
        "ServerLive": lambda _: messages.ServerLiveResponse(live=True),
        "ServerReady": lambda _: messages.ServerReadyResponse(ready=True),
        "ServerMetadata": lambda _: messages.ServerMetadataResponse(
            name=answers.NAME, version=modelathe_version(), extensions=answers.EXTENSIONS
        ),
        "ModelReady": lambda asked: messages.ModelReadyResponse(ready=stub.ready(asked.name, asked.version)),
        "ModelMetadata": metadata,
        "ModelConfig": lambda asked: messages.ModelConfigResponse(config=stub.find(asked.name, asked.version).config),
        "ModelStatistics": lambda asked: _statistics(stub, asked),
        "RepositoryIndex": lambda _: messages.RepositoryIndexResponse(models=stub.index()),
        "ModelInfer": lambda asked: _infer(stub, asked),
    }
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                _refusing(method),
                request_deserializer=getattr(messages, f"{name}Request").FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, method in methods.items()
        },
    )


def _refusing(method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def answer(request: Any, context: Any) -> Any:
        try:
            return method(request)
        except Refused as refused:
            context.abort(CODES[refused.status], str(refused))

    return answer


def _statistics(stub: Stub, request: Any) -> Any:
    response = messages.ModelStatisticsResponse()
    for one in stub.chosen(request.name, request.version):
        counts = stub.counts.get((one.model, one.number), Counts())
        entry = response.model_stats.add(name=one.model, version=str(one.number))
        entry.inference_count, entry.execution_count = counts.samples, counts.success
        entry.inference_stats.success.count = counts.success
        entry.inference_stats.success.ns = round(counts.success * stub.latency * 1e9)
        entry.inference_stats.fail.count = counts.fail
    return response


def _infer(stub: Stub, request: Any) -> Any:
    found = stub.find(request.model_name, request.model_version)
    raws = list(request.raw_input_contents)
    inputs = []
    for at, tensor in enumerate(request.inputs):
        if raws and tensor.HasField("contents"):
            raise Refused(
                400,
                "contents field must not be specified when using raw_input_contents for "
                f"'{tensor.name}' for model '{found.model}'",
            )
        size = answers.size(raws[at], tensor.datatype) if at < len(raws) else _typed_size(tensor, found.model)
        inputs.append(Given(tensor.name, tensor.datatype, tuple(tensor.shape), size))
    parameters = {
        key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in request.parameters.items()
    }
    result = stub.infer(found, inputs, [output.name for output in request.outputs], parameters)
    time.sleep(stub.latency)
    response = messages.ModelInferResponse(model_name=found.model, model_version=str(found.number), id=request.id)
    for name, array in result.items():
        response.outputs.add(name=name, datatype=TRITON_DTYPES[array.dtype.name], shape=array.shape)
        response.raw_output_contents.append(packed(array))
    return response


def _typed_size(tensor: Any, model: str) -> int:
    """Return the size of an input whose values stand in the message, as `Given` has it."""
    field = CONTENTS.get(tensor.datatype, "")
    used = [entry.name for entry, _ in tensor.contents.ListFields()]
    if not used:
        raise Refused(400, f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request.")
    if used != [field]:
        raise Refused(
            400,
            f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{model}' in {used[0]}, "
            f"expected datatype '{tensor.datatype}'",
        )
    count = len(getattr(tensor.contents, field))
    return count if tensor.datatype == "BYTES" else count * np.dtype(NUMPY_DTYPES[tensor.datatype]).itemsize
