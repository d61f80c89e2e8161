"""One instance of a model in a Python-based Triton backend: what the backends of all runtimes have in common.

It lies beside each backend's `model.py` in the server's environment, which imports it from there.
"""

import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb
from graph import idle_seconds, mismatch, refusal, remembered, unfed

NONFINITE = "lathe.nonfinite"
"""The parameter that makes an instance refuse NaN and infinity."""


class Instance:
    """What Triton calls: `initialize` once, then `execute`. The subclass of a runtime has these members.

    `load(path, config, processor, device)` loads the file and returns the graph's inputs and outputs, both as
    `mismatch` takes them; processor is CPU or GPU. `optional` then names the inputs that have a default in the graph.
    `run(names, feed)` returns the outputs of these names by name.
    `public_text(error)` is what a client may read of an exception: one sentence, without paths or code.
    `default_filename` is the file where config.pbtxt names none.
    """

    optional = ()

    def initialize(self, args):
        """Load the version's file; raises TritonModelException for anything that would answer wrongly."""
        config = json.loads(args["model_config"])
        reason = refusal(config, np.__version__)
        if reason:
            raise pb.TritonModelException(reason)
        path = Path(args["model_repository"]) / args["model_version"]
        path /= config.get("default_model_filename") or self.default_filename
        processor = args["model_instance_kind"].replace("KIND_", "")
        try:
            graph = self.load(str(path), config, processor, int(args["model_instance_device_id"] or 0))
        except pb.TritonModelException:
            raise
        except Exception as error:
            pb.Logger.log_error(f"{path}: {error}")
            raise pb.TritonModelException(f"{path.name} cannot be loaded: {self.public_text(error)}") from None
        reasons = [mismatch(config, kind, tensors) for kind, tensors in zip(("input", "output"), graph, strict=True)]
        reason = next(filter(None, [*reasons, unfed(config, graph[0], self.optional)]), None)
        if reason:
            raise pb.TritonModelException(reason)
        self.batching = config["max_batch_size"] > 0
        self.finite_only = NONFINITE in config.get("parameters", {})
        controls, self.states = remembered(config)
        self.memory, self.idle = {}, idle_seconds(config)
        self.inputs = [tensor["name"] for tensor in config["input"]] + controls + list(self.states.values())
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        """Answer `requests`, in one run of the model where they can share one; one answer each, in order."""
        if len(requests) > 1 and self.batching:
            answers = self._together(requests)
            if answers is not None:
                return answers
        return [self._alone(request) for request in requests]

    def _together(self, requests):
        """Run the requests as one batch; None if that fails, so that a bad request cannot spoil the others' answers."""
        try:
            feeds = [self._feed(request) for request in requests]
            wanted = [set(request.requested_output_names()) for request in requests]
            if any(feed.keys() != feeds[0].keys() for feed in feeds):
                raise ValueError("some have an optional input, others do not")
            names = [name for name in self.outputs if any(name in some for some in wanted)]
            batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
            results = self.run([*names, *self.states], batch)
            sizes = [len(next(iter(feed.values()))) for feed in feeds]
            if any(len(result) != sum(sizes) for result in results.values()):
                raise ValueError("an output does not have one row per sample")
        except Exception as error:
            pb.Logger.log_info(f"a batch of {len(requests)} requests failed, each is run alone: {error}")
            return None
        answers, start = [], 0
        for request, some, size in zip(requests, wanted, sizes, strict=True):
            rows = {name: array[start : start + size] for name, array in results.items()}
            self._remember(request, rows)
            answers.append(self._response({name: rows[name] for name in names if name in some}))
            start += size
        return answers

    def _alone(self, request):
        try:
            wanted = set(request.requested_output_names())
            names = [name for name in self.outputs if name in wanted]
            results = self.run([*names, *self.states], self._feed(request))
            self._remember(request, results)
            return self._response({name: results[name] for name in names})
        except Exception as error:
            # The client gets one plain sentence; paths, node names and the traceback's text stay in the server's log.
            pb.Logger.log_error(f"a request failed: {error}")
            code = pb.TritonError.INTERNAL
            if "INVALID_ARGUMENT" in str(error) or isinstance(error, ValueError):
                code = pb.TritonError.INVALID_ARG
            return pb.InferenceResponse(
                error=pb.TritonError(f"the model refused the request: {self.public_text(error)}", code)
            )

    def _feed(self, request):
        tensors = {name: pb.get_input_tensor_by_name(request, name) for name in self.inputs}
        feed = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        if self.finite_only:
            for name, array in feed.items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise ValueError(f"the input {name} holds NaN or infinity")
        if self.states and not request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
            feed.update(self.memory.get(request.correlation_id(), (0, {}))[1])
        return feed

    def _remember(self, request, results):
        """Keep a sequence's state until its end: the server hands a Python backend the initial one each time."""
        if not self.states:
            return
        sequence, now = request.correlation_id(), time.monotonic()
        self.memory.pop(sequence, None)
        if sequence and not request.flags() & pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
            self.memory[sequence] = now, {source: results[output].copy() for output, source in self.states.items()}
        # The server forgets a sequence without requests and tells nobody. The oldest are first.
        while self.memory and now - next(iter(self.memory.values()))[0] > 2 * self.idle:
            del self.memory[next(iter(self.memory))]

    def _response(self, arrays):
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()])
