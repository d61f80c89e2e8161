"""The Triton backend named `onnxruntime`, as a Python-based backend on ONNX Runtime's Python API.

tritonserver uses it where NVIDIA's native backend is absent, for repositories that say `backend: "onnxruntime"` and
hold `<version>/model.onnx`. It runs in the server's environment and imports nothing but numpy, onnxruntime and the
files that lie beside it there.

Of what the native backend documents (its README, and Triton's model configuration):

    input, output: all dtypes but BF16; strings; scalars; reshape   tested here
    inputs with a default in the graph, `optional` in config.pbtxt  tested here
    max_batch_size 0 and above, dynamic_batching, version_policy    tested here
    instance_group on the CPU, each with threads of its own         tested here
    sequence_batching with controls and implicit state              tested here; the backend itself keeps the state
    model_warmup, default_model_filename, external data             tested here
    response cache, priorities, queue policies                      Triton's core, tested here
    parameters intra_op_thread_count, inter_op_thread_count,
      execution_mode, enable_mem_arena, enable_mem_pattern,
      memory.enable_memory_arena_shrinkage                          tested here
    optimization.graph.level                                        tested here
    errors for one request, not its batch; no path in a text        tested here
    completing a config.pbtxt without inputs and outputs            tested here
    KIND_GPU, the accelerator cuda and its options                  tested on an H200. A session that lacks a provider
                                                                    is refused.
    the accelerator tensorrt and its options                        written as documented, not run
    the accelerator tensorrt-rtx, ONNX Runtime's plug-in            of ours alone; loaded on an H200: takes none
    IO binding on a GPU, output_pinned_memory                       tested on an H200. Strings go without it.
    input_pinned_memory                                             has no effect: Triton hands over plain memory
    BF16, batch_input and batch_output, ragged batches, the CPU
      accelerators, custom operator libraries, decoupled responses  refused when the model loads
    global thread pools, --backend-config=onnxruntime,...           do not reach a Python-based backend

No answer was compared with the native backend's own: there was no container to run it in. What the two share is the
file, ONNX Runtime, and this list.

Beyond it: parameters named `session.*` become ONNX Runtime session entries, and `modelathe.nonfinite` refuses NaN and
infinity; the native backend ignores both. numpy 2 is refused, because the carried server answers empty tensors with it.
"""

import mmap
import re
from pathlib import Path

import binding
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb
from complete import complete
from instance import NONFINITE, SLOTS, Instance

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
RTX = "tensorrt-rtx"
_SWITCHES = {"enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_THREADS = {"intra_op_thread_count": "intra_op_num_threads", "inter_op_thread_count": "inter_op_num_threads"}


def public_text(error):
    """Return what a client may read of an exception: ONNX Runtime's own sentence, without paths or code."""
    text = str(error).split("Status Message:")[-1].strip() or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text.splitlines()[0])
    return re.sub(r"(?:Load model from )?\S*/\S+\s*", "", text).strip()


_RENAMED = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_PRECISIONS = {"FP32": {}, **{name: {f"trt_{name.lower()}_enable": "1"} for name in ("FP16", "BF16", "INT8")}}
_CUDA = ("cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream")
"""Parameters of the model that Triton's own backend passes on to the CUDA provider, beside those of the accelerator."""
_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}
_STRATEGIES = {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}


def providers(config, processor, device):
    """Return what ONNX Runtime is to run the graph with, as `InferenceSession` takes it; the CPU comes last.

    Raises ValueError for an accelerator or a precision that there is not.
    """
    found = []
    if processor == "GPU":
        accelerators = (config.get("optimization") or {}).get("execution_accelerators") or {}
        asked = accelerators.get("gpu_execution_accelerator") or []
        options = {entry["name"]: dict(entry.get("parameters") or {}) for entry in asked}
        if unknown := set(options) - {"tensorrt", RTX, "cuda"}:
            raise ValueError(f"the accelerator {', '.join(unknown)} is not known")
        if RTX in options:
            return [(RTX, options[RTX]), "CPUExecutionProvider"]
        if "tensorrt" in options:
            found.append(("TensorrtExecutionProvider", _tensorrt(options["tensorrt"], device)))
        found.append(("CUDAExecutionProvider", {**_cuda(config), **options.get("cuda", {}), "device_id": device}))
    return [*found, "CPUExecutionProvider"]


def _tensorrt(asked, device):
    precision = asked.pop("precision_mode", "FP32")
    if precision not in _PRECISIONS:
        raise ValueError(f"precision_mode {precision} is none of {', '.join(_PRECISIONS)}")
    renamed = {_RENAMED.get(key, key): value for key, value in asked.items()}
    return {**renamed, **_PRECISIONS[precision], "device_id": device}


def _cuda(config):
    stated = {key: entry["string_value"] for key, entry in config.get("parameters", {}).items() if key in _CUDA}
    for key, words in (("cudnn_conv_algo_search", _SEARCHES), ("arena_extend_strategy", _STRATEGIES)):
        if key in stated:
            stated[key] = words[stated[key]]
    return stated


_CAST = b"\n\x02to\x18\n"
"""How a file holds the attribute of a Cast to float16."""


def _level(path, config):
    """Return Triton's level of graph optimization; where none is stated, one that is safe for float16.

    At a Transpose before a product in float16 the optimizer that lays tensors out anew for a CPU (NchwcTransformer of
    ONNX Runtime 1.31.1, its issue 28392) ends the process.
    """
    stated = int(((config.get("optimization") or {}).get("graph") or {}).get("level", 0))
    if stated or any(entry["data_type"] == "TYPE_FP16" for entry in config.get("input", ())):
        return stated or 1
    file = Path(path)
    if not file.stat().st_size:
        return 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return 1 if data.find(_CAST) >= 0 else 0


def _session_options(path, config):
    options = ort.SessionOptions()
    options.graph_optimization_level = _GRAPH_LEVELS.get(
        _level(path, config), ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
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
        elif key not in (NONFINITE, SLOTS, SHRINKAGE, *_CUDA):
            pb.Logger.log_warn(f"parameter {key} is not known to this backend and has no effect")
    return options


def _add_rtx(options, asked, device):
    """Register NVIDIA's plug-in with ONNX Runtime and let a session run on its device of this number."""
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    name = plugin.get_ep_name()
    ort.register_execution_provider_library(name, plugin.get_library_path())
    found = [each for each in ort.get_ep_devices() if each.ep_name == name]
    if device >= len(found):
        raise pb.TritonModelException(f"KIND_GPU asked for, but onnxruntime's {name} finds no GPU {device} here")
    options.add_provider_for_devices([found[device]], asked)


def _session(path, config, processor, device):
    """Load the model; a GPU instance must really have the providers that it was asked to have."""
    wanted = providers(config, processor, device)
    options = _session_options(path, config)
    if wanted[0][0] == RTX:
        _add_rtx(options, wanted[0][1], device)
        return ort.InferenceSession(path, options)
    session = ort.InferenceSession(path, options, providers=wanted)
    # Asked for a provider that does not start, onnxruntime quietly takes the next one.
    for name, _ in wanted[:-1]:
        if name not in session.get_providers():
            raise pb.TritonModelException(f"KIND_GPU asked for, but onnxruntime's {name} does not start here")
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

    @staticmethod
    def auto_complete_config(made):
        """Complete a configuration without inputs or outputs; Triton calls it only where the server was so started."""
        config = made.as_dict()
        if not (config["input"] and config["output"]):
            path = Path(pb.get_model_dir()) / (
                config.get("default_model_filename") or TritonPythonModel.default_filename
            )
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            try:
                complete(made, _described(session.get_inputs()), _described(session.get_outputs()))
            except ValueError as error:
                raise pb.TritonModelException(str(error)) from None
        return made

    def load(self, path, config, processor, device):
        """Load the graph and return its inputs and outputs."""
        self.session = _session(path, config, processor, device)
        self.place = binding.outputs_to(config, device) if processor == "GPU" else None
        optional = self.session.get_overridable_initializers()
        self.optional = {tensor.name for tensor in optional}
        inputs, outputs = [*self.session.get_inputs(), *optional], self.session.get_outputs()
        shrinkage = config.get("parameters", {}).get(SHRINKAGE)
        self.options = ort.RunOptions()
        if shrinkage:
            self.options.add_run_config_entry(SHRINKAGE, shrinkage["string_value"])
        self.strings = {tensor.name for tensor in [*inputs, *outputs] if tensor.type == "tensor(string)"}
        stated = _described(outputs)
        # A graph may leave an output's shape open, which shows as no dims at all.
        return _described(inputs), {name: (dtype, shape or None) for name, (dtype, shape) in stated.items()}

    def run(self, names, feed):
        """Return the outputs of these names for one batch."""
        feed = {name: _to_text(array) if name in self.strings else array for name, array in feed.items()}
        results = dict(zip(names, self._results(names, feed), strict=True))
        return {name: _to_bytes(array) if name in self.strings else array for name, array in results.items()}

    def _results(self, names, feed):
        if self.place is None or not self.strings.isdisjoint((*names, *feed)):
            return self.session.run(names, feed, self.options)
        try:
            return binding.run(self.session, names, feed, self.options, self.place)
        except RuntimeError as error:
            # A plain run says with its code what is wrong with a request; if it answers, the fault was the binding's.
            results = self.session.run(names, feed, self.options)
            pb.Logger.log_warn(f"tensors could not be bound, the model ran without that: {error}")
            return results
