"""Datatypes: what a configuration calls the type of a tensor; the protocol has another name for strings."""

from tritonclient.grpc.model_config_pb2 import DataType

from modelathe.tensors import TRITON_DTYPES


def of_dtype(dtype: str) -> str:
    """Return the name of a numpy dtype in a configuration, as in `TYPE_FP32`."""
    kind = TRITON_DTYPES[dtype]
    return f"TYPE_{'STRING' if kind == 'BYTES' else kind}"


def name(number: int) -> str:
    """Return the name of a type by its number in a configuration, as in `FP32`."""
    return str(DataType.Name(number)).removeprefix("TYPE_")


def in_protocol(number: int) -> str:
    """Return what the protocol calls a type, by its number in a configuration."""
    kind = name(number)
    return "BYTES" if kind == "STRING" else kind
