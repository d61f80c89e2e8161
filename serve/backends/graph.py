"""What a configuration may ask of our backends, and how it must agree with the model's file.

It lies beside each backend's `model.py` in the server's environment; `serve check` asks the same questions here.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def refusal(config: dict[str, Any], numpy_version: str) -> str | None:
    """Return why this backend cannot serve `config` (the model configuration as a dict), or None."""
    tensors = [*config.get("input", []), *config.get("output", [])]
    optimization = config.get("optimization") or {}
    reasons = {
        f"numpy {numpy_version} is installed, and the server's Python backend answers empty tensors with numpy 2": (
            int(numpy_version.split(".")[0]) >= 2
        ),
        "BF16 tensors are not supported": any(tensor["data_type"] == "TYPE_BF16" for tensor in tensors),
        "decoupled responses are not supported": (config.get("model_transaction_policy") or {}).get("decoupled"),
        "batch_input and batch_output are not supported": config.get("batch_input") or config.get("batch_output"),
        "ragged batches are not supported": any(tensor.get("allow_ragged_batch") for tensor in tensors),
        "accelerators on the CPU are not supported; the backend openvino is one": (
            (optimization.get("execution_accelerators") or {}).get("cpu_execution_accelerator")
        ),
        "custom operator libraries are not supported": (
            (config.get("model_operations") or {}).get("op_library_filename")
        ),
        "inputs and outputs must be listed in config.pbtxt": not (config.get("input") and config.get("output")),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def mismatch(config: dict[str, Any], kind: str, tensors: Mapping[str, tuple[str, Sequence[int] | None]]) -> str | None:
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
        if shape is None or (dims == [1] and not shape):
            # Triton knows no tensor without dims: outside of a batch, a single number has one of size 1 there.
            continue
        if len(dims) != len(shape) or any(has not in (-1, dim) for dim, has in zip(dims, shape, strict=True)):
            return f"the {kind} {name} has the shape {dims} by config.pbtxt and {shape} in the model (-1: any)"
    return None


def remembered(config: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the inputs that the server fills for a sequence, and each state's input by the output that it keeps."""
    batching = config.get("sequence_batching") or {}
    controls = [entry["name"] for entry in batching.get("control_input") or []]
    return controls, {entry["output_name"]: entry["input_name"] for entry in batching.get("state") or []}


def unfed(config: dict[str, Any], tensors: Mapping[str, Any], optional: Collection[str] = ()) -> str | None:
    """Return that the model needs an input which nobody would give it, or None.

    Args:
        config: as for `refusal`.
        tensors: the graph's inputs by name.
        optional: those of them that have a default in the graph.
    """
    controls, states = remembered(config)
    given = {*(entry["name"] for entry in config["input"]), *controls, *states.values()}
    lacking = sorted(set(tensors) - given - set(optional))
    return f"config.pbtxt lacks the input {', '.join(lacking)}, which the model needs" if lacking else None


def idle_seconds(config: dict[str, Any]) -> float:
    """Return after how long without a request the server takes a sequence for ended; Triton's default is a second."""
    return int((config.get("sequence_batching") or {}).get("max_sequence_idle_microseconds") or 1e6) / 1e6
