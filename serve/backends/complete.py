"""Completing a configuration that lacks inputs, outputs or a batch size, by the rules of Triton's own backends.

It lies beside each backend's `model.py` in the server's environment.
"""

from collections.abc import Mapping
from typing import Any

DEFAULT_MAX_BATCH = 4
"""What Triton's ONNX Runtime backend takes where nothing is said."""
SCHEDULERS = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")


def complete(
    made: Any, inputs: Mapping[str, tuple[str, list[int]]], outputs: Mapping[str, tuple[str, list[int]]]
) -> None:
    """Add to `made`, Triton's ModelConfig of the Python backend, what it lacks.

    The model can batch when the first dim of every input and output changes size; the server then batches by itself.

    Args:
        made: changed in place; what it states stays.
        inputs: the graph's inputs: Triton's data type, and dims with -1 for what changes size.
        outputs: its outputs.

    Raises:
        ValueError: it asks for batches, and the model cannot.
    """
    config = made.as_dict()
    batched = all(dims[:1] == [-1] for _, dims in (*inputs.values(), *outputs.values()))
    if not batched and config["max_batch_size"]:
        raise ValueError("max_batch_size is set, and the model's tensors do not all have a free batch axis")
    if batched:
        made.set_max_batch_size(config["max_batch_size"] or DEFAULT_MAX_BATCH)
        if config["max_batch_size"] > 1 and not any(name in config for name in SCHEDULERS):
            made.set_dynamic_batching()
    for kind, found, add in (("input", inputs, made.add_input), ("output", outputs, made.add_output)):
        if config[kind]:
            continue
        for name, (dtype, dims) in found.items():
            own = dims[1:] if batched else dims
            add({"name": name, "data_type": dtype, "dims": own or [1]})
            if batched and not own:
                # Its own call takes no reshape; what `as_dict` returns is the configuration itself.
                config[kind][-1]["reshape"] = {"shape": []}
