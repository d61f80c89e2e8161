"""The Triton backend named `onnxruntime`, as a Python-based backend on ONNX Runtime's Python API.

tritonserver uses it where NVIDIA's native backend is absent, for repositories that say `backend: "onnxruntime"` and
hold `<version>/model.onnx`. It runs in the server's environment and imports nothing but numpy, onnxruntime and
`instance.py`, which lies beside it there.

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

import re

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb
from instance import Instance

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


def _session(path, config, processor, device):
    """Load the model; on a GPU instance, only a session that really has the CUDA provider will do."""
    providers = ["CPUExecutionProvider"]
    if processor == "GPU":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device}))
    session = ort.InferenceSession(path, _session_options(config), providers=providers)
    # Asked for a provider that does not start, onnxruntime quietly takes the next one.
    if processor == "GPU" and "CUDAExecutionProvider" not in session.get_providers():
        raise pb.TritonModelException("KIND_GPU asked for, but onnxruntime's CUDA provider does not start here")
    return session


def _described(tensors):
    """Return ONNX Runtime's inputs or outputs as `mismatch` takes them."""
    return {
        tensor.name: (
            _DTYPES.get(tensor.type, tensor.type),
            [dim if isinstance(dim, int) else -1 for dim in tensor.shape],
        )
        for tensor in tensors
    }


def _to_text(array):
    """Turn the bytes of a Triton string tensor into the str that onnxruntime takes."""
    flat = [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel()]
    return np.array(flat, dtype=object).reshape(array.shape)


def _to_bytes(array):
    """Turn the str that onnxruntime gives into the bytes of a Triton string tensor."""
    flat = [item.encode() if isinstance(item, str) else item for item in array.ravel()]
    return np.array(flat, dtype=object).reshape(array.shape)


class TritonPythonModel(Instance):
    """One instance of a model, in a process of its own, on ONNX Runtime."""

    default_filename = "model.onnx"
    public_text = staticmethod(public_text)

    def load(self, path, config, processor, device):
        """Load the graph and return its inputs and outputs."""
        self.session = _session(path, config, processor, device)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.strings = {tensor.name for tensor in [*inputs, *outputs] if tensor.type == "tensor(string)"}
        stated = _described(outputs)
        # A graph may leave an output's shape open, which shows as no dims at all.
        return _described(inputs), {name: (dtype, shape or None) for name, (dtype, shape) in stated.items()}

    def run(self, names, feed):
        """Return the outputs of these names for one batch."""
        feed = {name: _to_text(array) if name in self.strings else array for name, array in feed.items()}
        results = dict(zip(names, self.session.run(names, feed), strict=True))
        return {name: _to_bytes(array) if name in self.strings else array for name, array in results.items()}
