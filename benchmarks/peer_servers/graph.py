"""What every peer's server needs of ONNX Runtime: a session with our threads, and tensors out of V2 JSON and back."""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime as ort

LARGEST, DELAY_SECONDS = 32, 0.002
"""The peers' batch limit and, where a peer must have one, how long a request waits for others."""
DTYPES = {"FP32": np.float32, "INT64": np.int64}


class Graph:
    """A model's session, and its calls with a batch of requests."""

    def __init__(self, path: str, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        self.dtypes = [np.float32 if "float" in tensor.type else np.int64 for tensor in self.session.get_inputs()]

    def run(self, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """Return each request's outputs, in order; the requests have a batch axis and share one call."""
        batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
        ends = np.cumsum([len(feed[self.inputs[0]]) for feed in feeds])[:-1]
        results = [np.split(result, ends) for result in self.session.run(self.outputs, batch)]
        return [list(outputs) for outputs in zip(*results, strict=True)]

    def feed(self, body: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the tensors of a request in V2 JSON."""
        return {
            entry["name"]: np.array(entry["data"], DTYPES[entry["datatype"]]).reshape(entry["shape"])
            for entry in body["inputs"]
        }

    def answer(self, outputs: list[np.ndarray]) -> dict[str, Any]:
        """Return the answer in V2 JSON, its numbers as an array."""
        named = zip(self.outputs, outputs, strict=True)
        return {
            "outputs": [
                {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.ravel()}
                for name, array in named
            ]
        }


def graphs() -> dict[str, Graph]:
    """Return the models that the command line names: a JSON object of path and threads by model."""
    return {name: Graph(**entry) for name, entry in json.loads(sys.argv[2]).items()}


def port() -> int:
    """Return the port that the command line names."""
    return int(sys.argv[1])
