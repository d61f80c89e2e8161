"""Where the CPU's 8-bit products overflow, quantized numbers have 7 bits unless somebody says otherwise."""

from pathlib import Path

import pytest

from optimize import cpu


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
