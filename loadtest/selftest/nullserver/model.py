"""Model: what the null server says of its one model, its canned answers, and the queue before it."""

import heapq
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelathe.tensors import TRITON_DTYPES, Dim, TensorSpec, packed

MODEL = "null"


class Queue:
    """When each request is done, and the counts of the statistics."""

    def __init__(self, service: float, stall: float, each: int, instances: int) -> None:
        self.service, self.stall, self.each = service, stall, each
        self.requests = self.samples = 0
        self.waited = self.held = 0.0
        self._free = [0.0] * instances

    def due(self, batch: int) -> float:
        """Take a request in; return when its answer is due, on the monotonic clock, and 0 for at once."""
        self.requests += 1
        self.samples += batch
        if not self.service and not (self.stall and self.each):
            return 0.0
        hold = self.service
        if self.each and self.requests % self.each == 0:
            hold += self.stall
        now = time.monotonic()
        start = max(now, self._free[0])
        heapq.heapreplace(self._free, start + hold)
        self.waited += start - now
        self.held += hold
        return start + hold


class Model:
    """What the model's documents say, and its canned answers."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], queue: Queue) -> None:
        self.inputs, self.outputs, self.queue = inputs, outputs, queue
        first = inputs[0].dims[0] if inputs[0].batched else None
        self.max_batch = first.maximum if isinstance(first, Dim) else 0

    def metadata(self) -> dict[str, Any]:
        """Return names, types and shapes."""
        described = {"inputs": list(map(_described, self.inputs)), "outputs": list(map(_described, self.outputs))}
        return {"name": MODEL, "versions": ["1"], "platform": "null", **described}

    def config(self) -> dict[str, Any]:
        """Return what a load run asks of a model's configuration."""
        return {"name": MODEL, "max_batch_size": self.max_batch}

    def statistics(self) -> dict[str, Any]:
        """Return what was counted since the start, as Triton words it."""
        queue = self.queue
        seconds = {"success": queue.waited + queue.held, "queue": queue.waited, "compute_infer": queue.held}
        seconds |= {"fail": 0.0, "compute_input": 0.0, "compute_output": 0.0}
        counts = {
            key: {"count": 0 if key == "fail" else queue.requests, "ns": int(value * 1e9)}
            for key, value in seconds.items()
        }
        entry: dict[str, Any] = {"name": MODEL, "version": "1", "inference_stats": counts}
        entry |= {"inference_count": queue.samples, "execution_count": queue.requests}
        return {"model_stats": [entry]}

    def batch(self, shape: Sequence[int]) -> int:
        """Return how many samples a request has whose first input has this shape."""
        return int(shape[0]) if self.max_batch and shape else 1

    def answer(self, batch: int) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Return the outputs' descriptions and bytes."""
        arrays = [spec.generate(np.random.default_rng([place]), batch) for place, spec in enumerate(self.outputs)]
        described = [
            {"name": spec.name, "datatype": TRITON_DTYPES[spec.dtype], "shape": list(array.shape)}
            for spec, array in zip(self.outputs, arrays, strict=True)
        ]
        return described, [packed(array) for array in arrays]


def _described(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if isinstance(dim, Dim) else dim for dim in spec.dims]
    return {"name": spec.name, "datatype": TRITON_DTYPES[spec.dtype], "shape": shape}
