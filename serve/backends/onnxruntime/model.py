"""The Triton backend named `onnxruntime`, as a Python-based backend on ONNX Runtime's Python API.

tritonserver uses it where NVIDIA's native backend is absent, for repositories that say `backend: "onnxruntime"` and
hold `<version>/model.onnx`. It runs in the server's environment and imports nothing but numpy and onnxruntime.

Read from config.pbtxt as the native backend reads it:
    input, output (all dtypes but BF16; strings; `reshape`), max_batch_size, dynamic_batching, version_policy,
    instance_group, model_warmup, default_model_filename, optimization.graph.level, and the parameters
    intra_op_thread_count, inter_op_thread_count, execution_mode, enable_mem_arena, enable_mem_pattern.
Beyond the native backend:
    parameters named `session.*` become ONNX Runtime session entries (the native backend ignores them).
Written as documented and not run by lathe's tests, for want of the hardware:
    KIND_GPU instances. Loading fails unless the session really runs on the CUDA provider.
Refused when the model loads, because the answers would be wrong or the setting without effect:
    numpy 2, BF16, implicit state, decoupled responses, batch_input and batch_output, ragged batches, execution
    accelerators, custom operator libraries, and inputs or outputs that are not the graph's in name, type and shape.
Not done:
    completing an absent config.pbtxt.
"""

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb

_GRAPH_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_DTYPES = {
    "tensor(bool)": "TYPE_BOOL",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32",
    "tensor(uint64)": "TYPE_UINT64",
    "tensor(int8)": "TYPE_INT8",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(string)": "TYPE_STRING",
    "tensor(bfloat16)": "TYPE_BF16",
}
_SWITCHES = {"enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_THREADS = {"intra_op_thread_count": "intra_op_num_threads", "inter_op_thread_count": "inter_op_num_threads"}


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


def public_text(error):
    """Return what a client may read of an exception: ONNX Runtime's own sentence, without paths or code."""
    text = str(error).split("Status Message:")[-1].strip() or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text.splitlines()[0])
    return re.sub(r"(?:Load model from )?\S*/\S+\s*", "", text).strip()


def _session_options(config):
    options = ort.SessionOptions()
    level = int(((config.get("optimization") or {}).get("graph") or {}).get("level", 0))
    options.graph_optimization_level = _GRAPH_LEVELS.get(level, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    for key, entry in config.get("parameters", {}).items():
        value = entry["string_value"]
        if key in _THREADS:
            setattr(options, _THREADS[key], int(value))
        elif key in _SWITCHES:
            setattr(options, _SWITCHES[key], value != "0")
        elif key == "execution_mode":
            options.execution_mode = (
                ort.ExecutionMode.ORT_PARALLEL if value == "1" else ort.ExecutionMode.ORT_SEQUENTIAL
            )
        elif key.startswith("session."):
            options.add_session_config_entry(key, value)
        else:
            pb.Logger.log_warn(f"parameter {key} is not known to this backend and has no effect")
    return options


def _session(path, config, kind, device):
    """Load the model; on a GPU instance, only a session that really has the CUDA provider will do."""
    providers = ["CPUExecutionProvider"]
    if kind == "GPU":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device}))
    try:
        session = ort.InferenceSession(path, _session_options(config), providers=providers)
    except Exception as error:
        pb.Logger.log_error(f"{path}: {error}")
        raise pb.TritonModelException(f"{Path(path).name} cannot be loaded: {public_text(error)}") from None
    # Asked for a provider that does not start, onnxruntime quietly takes the next one.
    if kind == "GPU" and "CUDAExecutionProvider" not in session.get_providers():
        raise pb.TritonModelException("KIND_GPU asked for, but onnxruntime's CUDA provider does not start here")
    return session


def mismatch(config, kind, tensors):
    """Return how the `kind`s (input or output) in `config` differ from the graph's `tensors`, or None."""
    have = {tensor.name: tensor for tensor in tensors}
    for stated in config[kind]:
        name = stated["name"]
        if name not in have:
            return f"config.pbtxt has the {kind} {name}, model.onnx has {', '.join(sorted(have))}"
        dtype = _DTYPES.get(have[name].type, have[name].type)
        if stated["data_type"] != dtype:
            return f"the {kind} {name} is {stated['data_type']} in config.pbtxt and {dtype} in model.onnx"
        dims = stated["reshape"].get("shape", []) if "reshape" in stated else stated["dims"]
        dims = [-1] * (config["max_batch_size"] > 0) + [int(dim) for dim in dims]
        shape = [dim if isinstance(dim, int) else -1 for dim in have[name].shape]
        # A graph may leave an output's shape open, which shows as no dims at all.
        fits = len(dims) == len(shape) and all(has in (-1, dim) for dim, has in zip(dims, shape, strict=True))
        if not fits and (shape or kind == "input"):
            return f"the {kind} {name} has the shape {dims} by config.pbtxt and {shape} in model.onnx (-1: any)"
    return None


def _to_text(array):
    """Turn the bytes of a Triton string tensor into the str that onnxruntime takes."""
    flat = [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel()]
    return np.array(flat, dtype=object).reshape(array.shape)


def _to_bytes(array):
    """Turn the str that onnxruntime gives into the bytes of a Triton string tensor."""
    flat = [item.encode() if isinstance(item, str) else item for item in array.ravel()]
    return np.array(flat, dtype=object).reshape(array.shape)


class TritonPythonModel:
    """One instance of a model, in a process of its own; Triton calls `initialize` once, then `execute`."""

    def initialize(self, args):
        """Load `<version>/model.onnx`; raises TritonModelException for anything that would answer wrongly."""
        config = json.loads(args["model_config"])
        reason = refusal(config, np.__version__)
        if reason:
            raise pb.TritonModelException(reason)
        path = Path(args["model_repository"]) / args["model_version"]
        path /= config.get("default_model_filename") or "model.onnx"
        processor = args["model_instance_kind"].replace("KIND_", "")
        self.session = _session(str(path), config, processor, int(args["model_instance_device_id"] or 0))
        for kind, tensors in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            reason = mismatch(config, kind, tensors)
            if reason:
                raise pb.TritonModelException(reason)
        self.batching = config["max_batch_size"] > 0
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        tensors = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.strings = {tensor.name for tensor in tensors if tensor.type == "tensor(string)"}

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
            results = self._run(names, batch)
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
            return self._response(self._run([name for name in self.outputs if name in wanted], self._feed(request)))
        except Exception as error:
            # The client gets one plain sentence; paths, node names and the traceback's text stay in the server's log.
            pb.Logger.log_error(f"a request failed: {error}")
            code = pb.TritonError.INTERNAL
            if "INVALID_ARGUMENT" in str(error) or isinstance(error, ValueError):
                code = pb.TritonError.INVALID_ARG
            return pb.InferenceResponse(
                error=pb.TritonError(f"the model refused the request: {public_text(error)}", code)
            )

    def _feed(self, request):
        feed = {}
        for name in self.inputs:
            tensor = pb.get_input_tensor_by_name(request, name)
            if tensor is not None:
                array = tensor.as_numpy()
                feed[name] = _to_text(array) if name in self.strings else array
        return feed

    def _run(self, names, feed):
        results = dict(zip(names, self.session.run(names, feed), strict=True))
        return {name: _to_bytes(array) if name in self.strings else array for name, array in results.items()}

    def _response(self, arrays):
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in arrays.items()])
