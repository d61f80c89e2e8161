"""KServe's Python server; it has no batching of its own."""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from graph import Graph, graphs, port
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server


class Served(Model):
    """One model, called in a thread of its own, so that the server goes on answering."""

    def __init__(self, name: str, graph: Graph) -> None:
        super().__init__(name)
        self.graph, self.pool, self.ready = graph, ThreadPoolExecutor(1), True

    async def predict(self, request: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        feed = {tensor.name: tensor.as_numpy() for tensor in request.inputs}
        (results,) = await asyncio.get_running_loop().run_in_executor(self.pool, self.graph.run, [feed])
        outputs = []
        for name, array in zip(self.graph.outputs, results, strict=True):
            output = InferOutput(name=name, shape=list(array.shape), datatype="FP32")
            output.set_data_from_numpy(array, binary_data=False)
            outputs.append(output)
        return InferResponse(response_id=request.id or "0", model_name=self.name, infer_outputs=outputs)


if __name__ == "__main__":
    model_server.args = argparse.Namespace(**{**vars(model_server.args), "enable_grpc": False})
    ModelServer(http_port=port(), enable_grpc=False, workers=1, access_log_format=None).start(
        [Served(name, graph) for name, graph in graphs().items()]
    )
