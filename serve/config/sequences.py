"""Sequence batching: the part of a model's configuration that makes the server remember."""

import math
from collections.abc import Mapping

from tritonclient.grpc.model_config_pb2 import TYPE_STRING, ModelConfig, ModelSequenceBatching

from modelathe.errors import BadInput
from modelathe.tensors import Dim, TensorSpec
from serve.config import datatypes
from serve.config.settings import Sequences

CORRID = ModelSequenceBatching.Control.CONTROL_SEQUENCE_CORRID
FLAGS = {"bool": "bool_false_true", "float32": "fp32_false_true", "int32": "int32_false_true"}
"""The dtypes of an input that takes a flag, and the field that says what no and yes are in it."""
SLOTS = 256
"""How many sequences there may be at a time unless told otherwise."""
SPARE = 1024
"""How many more per instance reach the backend, which refuses them."""
SLOTS_KEY = "modelathe.slots"
"""The parameter that tells our backends how many sequences an instance takes; others ignore it."""
IDS = ("uint64", "int64", "uint32", "int32")
"""The dtypes of an input that takes a sequence's id; text does not reach the model as it is in Triton 24.10."""


def add(config: ModelConfig, sequence: Sequences, specs: Mapping[str, TensorSpec], instances: int) -> None:
    """Write `sequence_batching` into the configuration.

    Raises:
        BadInput: a control or a state has a dtype or dims that it cannot have.
    """
    if sequence.slots and sequence.strategy == "direct":
        raise BadInput(
            "sequence: with direct, slots are the rows of the largest batch",
            where="settings",
            fix="set max_batch instead, or strategy = 'oldest'",
        )
    made = config.sequence_batching
    made.max_sequence_idle_microseconds = round(sequence.idle_s * 1e6)
    if sequence.strategy == "direct":
        made.direct.SetInParent()
    else:
        slots = math.ceil((sequence.slots or max(SLOTS, config.max_batch_size * instances)) / instances)
        config.parameters[SLOTS_KEY].string_value = str(slots)
        # Of those beyond, Triton would let the clients wait without a word; the backend is to see and refuse them.
        made.oldest.max_candidate_sequences = slots + SPARE
    for kind, name in sequence.controls().items():
        control = made.control_input.add(name=name).control.add(kind=kind)
        dtype = specs[name].dtype
        known = IDS if kind.endswith("CORRID") else tuple(FLAGS)
        if dtype not in known:
            text = ", and Triton 24.10 does not hand on ids that are text as they are" if dtype == "object" else ""
            what = f"sequence: the input {name} has the dtype {dtype}{text}"
            raise BadInput(what, where="settings", fix=f"let it take one of {', '.join(known)}, or leave it out")
        if kind.endswith("CORRID"):
            control.data_type = datatypes.of_dtype(dtype)
        else:
            getattr(control, FLAGS[dtype]).extend([0, 1])
    for source, result in sequence.state.items():
        _add_state(made, specs[source], specs[result], bool(config.max_batch_size))


def _add_state(made: ModelSequenceBatching, source: TensorSpec, result: TensorSpec, batched: bool) -> None:
    dims = source.dims[1:] if batched else source.dims
    if source.dtype != result.dtype or any(isinstance(dim, Dim) for dim in dims):
        raise BadInput(
            f"sequence: the state {source.name} must have fixed dims and the dtype of {result.name}",
            fix="give it one shape, whatever the request",
        )
    state = made.state.add(input_name=source.name, output_name=result.name, data_type=datatypes.of_dtype(source.dtype))
    state.dims.extend(int(dim) for dim in dims if not isinstance(dim, Dim))
    first = state.initial_state.add(name="zeros", data_type=state.data_type, zero_data=True)
    first.dims.extend(state.dims)


def text_ids(config: ModelConfig) -> list[str]:
    """Return the inputs that take a sequence's id as text."""
    return [
        entry.name
        for entry in config.sequence_batching.control_input
        if any(control.kind == CORRID and control.data_type == TYPE_STRING for control in entry.control)
    ]
