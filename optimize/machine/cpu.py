"""What is asked of the device: how far its CPU adds 8-bit products, which integers activations become, bfloat16."""

from pathlib import Path

EXACT_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Any of these adds 8-bit products in 32 bits. Other x86 CPUs add pairs of them in 16 bits, which overflow."""
BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
"""Any of these multiplies in bfloat16, or reads it; without one PyTorch converts in software."""


def flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the features that Linux lists for the first core of an x86 CPU; empty where it lists none."""
    try:
        line = next((line for line in file.read_text().splitlines() if line.startswith("flags")), "")
    except OSError:
        return set()
    return set(line.partition(":")[2].split())


def has_bfloat16() -> bool:
    """Return whether this machine's CPU is known to have products of bfloat16."""
    return not flags().isdisjoint(BFLOAT16)


def lacks_bfloat16() -> bool:
    """Return whether this machine's CPU is known to have no products of bfloat16."""
    found = flags()
    return bool(found) and found.isdisjoint(BFLOAT16)


def reduced_range(asked: bool | None, device: str) -> bool:
    """Return whether 8-bit numbers are to have 7 bits, so that sums of their products cannot overflow.

    Args:
        asked: what the user says; None where this machine's CPU decides.
        device: where the model will run; a GPU adds in 32 bits.
    """
    if asked is not None:
        return asked
    found = flags()
    return device == "cpu" and bool(found) and found.isdisjoint(EXACT_INT8)


def signed(asked: str, device: str) -> bool:
    """Return whether activations become int8 around zero, which TensorRT asks for, and not uint8 with a zero point.

    Args:
        asked: `int8`, `uint8`, or `auto`, where the device decides.
        device: where the model will run.
    """
    return asked == "int8" or (asked == "auto" and device == "cuda")
