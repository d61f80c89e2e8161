"""Where the CPU's 8-bit products overflow, quantized numbers have 7 bits unless somebody says otherwise."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from modelathe.tensors import BATCH, TensorSpec
from optimize.machine import cpu
from optimize.methods.quantize.dynamic import Dynamic
from optimize.methods.quantize.nncf import Nncf
from optimize.methods.quantize.static import Static
from tests.optimize.methods.quantize.test_quantize import Quantize, distance, quantize, workload

__all__ = ["quantize"]


def test_the_features_of_the_cpu_are_read_from_its_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni amx_bf16\n\nprocessor\t: 1\nflags\t\t: none\n")
    assert cpu.flags(file) == {"fpu", "avx2", "avx512_vnni", "amx_bf16"}
    assert cpu.flags(tmp_path / "absent") == set()


@pytest.mark.parametrize(
    ("found", "device", "reduced"),
    [
        ({"avx2"}, "cpu", True),
        ({"avx2", "avx512f"}, "cpu", True),
        ({"avx2", "avx_vnni"}, "cpu", False),
        ({"amx_int8"}, "cpu", False),
        ({"avx2"}, "cuda", False),
        (set(), "cpu", False),  # no x86: its products are exact
    ],
)
def test_seven_bits_where_products_overflow(
    monkeypatch: pytest.MonkeyPatch, found: set[str], device: str, reduced: bool
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: found)
    assert cpu.reduced_range(None, device) == reduced
    assert cpu.reduced_range(True, device)
    assert not cpu.reduced_range(False, device)


@pytest.mark.parametrize("method", [Dynamic, Static, Nncf])
def test_no_weight_has_more_than_seven_bits(method: type, quantize: Quantize, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = workload(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(),
        TensorSpec("input", "float32", (BATCH, 64), (0, 1)),
    )
    for reduced in (True, False):
        path = quantize(method(reduce_range=reduced), tmp_path / f"{reduced}.onnx", made)
        weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
        largest = max(np.abs(weight.astype(np.int16)).max() for weight in weights if weight.dtype == np.int8)
        assert (largest <= 64) == reduced
        if reduced:
            assert distance(path, made) < 0.1
