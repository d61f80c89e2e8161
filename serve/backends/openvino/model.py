"""The Triton backend named `openvino`, as a Python-based backend on OpenVINO's Python API, for the CPU.

tritonserver uses it where Triton's own OpenVINO backend is absent, for repositories that say `backend: "openvino"`. It
runs in the server's environment and imports nothing but numpy, openvino and `instance.py`, which lies beside it there.

Read from config.pbtxt as Triton's own backend reads it:
    input, output (all dtypes but BF16, FP64 and strings; `reshape`), max_batch_size, dynamic_batching, version_policy,
    instance_group, model_warmup, default_model_filename (model.xml where absent; model.onnx serves too), and the
    parameters PERFORMANCE_HINT, INFERENCE_NUM_THREADS, COMPILATION_NUM_THREADS, NUM_STREAMS and HINT_BF16.
Otherwise than there:
    a batch runs at its own size, so ENABLE_BATCH_PADDING and SKIP_OV_DYNAMIC_BATCHSIZE have no effect.
Refused when the model loads, because the answers would be wrong or the setting without effect:
    what `instance.refusal` lists, KIND_GPU, FP64 and strings, the parameters CPU_EXTENSION_PATH, RESHAPE_IO_LAYERS and
    TARGET_DEVICE (but for CPU), and inputs or outputs that are not the graph's in name, type and shape.
OpenVINO does not check what it is given beyond dtype and shape: an index outside of a table is no error.
"""

import re

import openvino
import triton_python_backend_utils as pb
from instance import NONFINITE, SLOTS, Instance

_DTYPES = {
    "boolean": "TYPE_BOOL",
    "u8": "TYPE_UINT8",
    "u16": "TYPE_UINT16",
    "u32": "TYPE_UINT32",
    "u64": "TYPE_UINT64",
    "i8": "TYPE_INT8",
    "i16": "TYPE_INT16",
    "i32": "TYPE_INT32",
    "i64": "TYPE_INT64",
    "f16": "TYPE_FP16",
    "f32": "TYPE_FP32",
}
_PASSED_ON = ("PERFORMANCE_HINT", "INFERENCE_NUM_THREADS", "COMPILATION_NUM_THREADS", "NUM_STREAMS")
_PASSED_OVER = ("ENABLE_BATCH_PADDING", "SKIP_OV_DYNAMIC_BATCHSIZE", NONFINITE, SLOTS)


def settings(config):
    """Return OpenVINO's properties for the parameters in `config`; raises ValueError for what cannot be honoured."""
    found = {}
    for key, entry in config.get("parameters", {}).items():
        value = entry["string_value"].upper()
        if key in _PASSED_ON:
            found[key] = value
        elif key == "HINT_BF16" and value == "YES":
            found["INFERENCE_PRECISION_HINT"] = "bf16"
        elif key not in _PASSED_OVER and (key, value) not in (
            ("TARGET_DEVICE", "CPU"),
            ("RESHAPE_IO_LAYERS", "NO"),
        ):
            raise ValueError(f"the parameter {key} = {entry['string_value']} is not supported")
    return found


def public_text(error):
    """Return what a client may read of an exception: OpenVINO's own last sentence, without paths."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"\S*/\S+\s*", "", lines[-1]).strip()


def _described(ports):
    """Return OpenVINO's inputs or outputs as `mismatch` takes them."""
    tensors = {}
    for port in ports:
        shape = port.get_partial_shape()
        dims = None if shape.rank.is_dynamic else [-1 if dim.is_dynamic else dim.get_length() for dim in shape]
        kind = port.get_element_type().get_type_name()
        tensors[port.get_any_name()] = (_DTYPES.get(kind, f"{kind}, which is not supported"), dims)
    return tensors


class TritonPythonModel(Instance):
    """One instance of a model, in a process of its own, on OpenVINO."""

    default_filename = "model.xml"
    public_text = staticmethod(public_text)

    def load(self, path, config, processor, device):
        """Load the graph and return its inputs and outputs."""
        if processor == "GPU":
            raise pb.TritonModelException("KIND_GPU is not supported, this backend is for the CPU")
        core = openvino.Core()
        model = core.read_model(path)
        inputs, outputs = _described(model.inputs), _described(model.outputs)
        if set(inputs) != {tensor["name"] for tensor in config["input"]}:
            # OpenVINO would not miss an input: it takes what the request before has left there.
            raise ValueError(f"the model's inputs are {', '.join(sorted(inputs))}, config.pbtxt has others")
        self.request = core.compile_model(model, "CPU", settings(config)).create_infer_request()
        self.order = list(outputs)
        return inputs, outputs

    def run(self, names, feed):
        """Return the outputs of these names for one batch."""
        results = self.request.infer(feed)
        return {name: results[self.order.index(name)] for name in names}
