"""MLServer with its adaptive batching: a runtime of its own for ONNX files, found by `mlserver start`."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from graph import Graph
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Served(MLModel):
    """One model, called in a thread of its own; a request may be several that MLServer has joined."""

    async def load(self) -> bool:
        self.graph, self.pool = Graph(**self.settings.parameters.extra), ThreadPoolExecutor(1)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        (results,) = await asyncio.get_running_loop().run_in_executor(self.pool, self.graph.run, [feed])
        named = zip(self.graph.outputs, results, strict=True)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(name, array) for name, array in named]
        )
