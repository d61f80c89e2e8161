"""One instance of a model in a Python-based Triton backend: what the backends of all runtimes have in common.

It lies beside each backend's `model.py` in the server's environment, which imports it from there.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb


def refusal(config, numpy_version):
    """Return why this backend cannot serve `config` (the model configuration as a dict), or None."""
    tensors = [*config.get("input", []), *config.get("output", [])]
    optimization = config.get("optimization") or {}
    reasons = {
        f"numpy {numpy_version} is installed, and the server's Python backend answers empty tensors with numpy 2": (
            int(numpy_version.split(".")[0]) >= 2
        ),
        "BF16 tensors are not supported": any(tensor["data_type"] == "TYPE_BF16" for tensor in tensors),
        "implicit state (sequence_batching.state) is not supported": (
            (config.get("sequence_batching") or {}).get("state")
        ),
        "decoupled responses are not supported": (config.get("model_transaction_policy") or {}).get("decoupled"),
        "batch_input and batch_output are not supported": config.get("batch_input") or config.get("batch_output"),
        "ragged batches are not supported": any(tensor.get("allow_ragged_batch") for tensor in tensors),
        "execution accelerators are not supported": any((optimization.get("execution_accelerators") or {}).values()),
        "custom operator libraries are not supported": (
            (config.get("model_operations") or {}).get("op_library_filename")
        ),
        "inputs and outputs must be listed in config.pbtxt": not (config.get("input") and config.get("output")),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def mismatch(config, kind, tensors):
    """Return how the `kind`s (input or output) in `config` differ from the graph's, or None.

    `tensors` maps the names in the graph to (Triton data type, dims), with -1 for any dim and None for unknown dims.
    """
    for stated in config[kind]:
        name = stated["name"]
        if name not in tensors:
            return f"config.pbtxt has the {kind} {name}, the model has {', '.join(sorted(tensors))}"
        dtype, shape = tensors[name]
        if stated["data_type"] != dtype:
            return f"the {kind} {name} is {stated['data_type']} in config.pbtxt and {dtype} in the model"
        dims = stated["reshape"].get("shape", []) if "reshape" in stated else stated["dims"]
        dims = [-1] * (config["max_batch_size"] > 0) + [int(dim) for dim in dims]
        if shape is None:
            continue
        if len(dims) != len(shape) or any(has not in (-1, dim) for dim, has in zip(dims, shape, strict=True)):
            return f"the {kind} {name} has the shape {dims} by config.pbtxt and {shape} in the model (-1: any)"
    return None


class Instance:
    """What Triton calls: `initialize` once, then `execute`. The subclass of a runtime has these members.

    `load(path, config, processor, device)` loads the file and returns the graph's inputs and outputs, both as
    `mismatch` takes them; processor is CPU or GPU.
    `run(names, feed)` returns the outputs of these names by name.
    `public_text(error)` is what a client may read of an exception: one sentence, without paths or code.
    `default_filename` is the file where config.pbtxt names none.
    """

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
        for kind, tensors in zip(("input", "output"), graph, strict=True):
            reason = mismatch(config, kind, tensors)
            if reason:
                raise pb.TritonModelException(reason)
        self.batching = config["max_batch_size"] > 0
        self.inputs = [tensor["name"] for tensor in config["input"]]
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
            names = [name for name in self.outputs if any(name in some for some in wanted)]
            batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
            results = self.run(names, batch)
            sizes = [len(next(iter(feed.values()))) for feed in feeds]
            if any(len(result) != sum(sizes) for result in results.values()):
                raise ValueError("an output does not have one row per sample")
        except Exception as error:
            pb.Logger.log_info(f"a batch of {len(requests)} requests failed, each is run alone: {error}")
            return None
        answers, start = [], 0
        for some, size in zip(wanted, sizes, strict=True):
            rows = {name: array[start : start + size] for name, array in results.items() if name in some}
            answers.append(self._response(rows))
            start += size
        return answers

    def _alone(self, request):
        try:
            wanted = set(request.requested_output_names())
            return self._response(self.run([name for name in self.outputs if name in wanted], self._feed(request)))
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
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _response(self, arrays):
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()])
