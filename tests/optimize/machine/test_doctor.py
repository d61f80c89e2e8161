"""What `optimize doctor` says of machines that lack something."""

import importlib
import importlib.metadata
import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modelathe.commandline import install_line
from optimize.machine import doctor
from serve.config.errors import NotInstalled
from serve.server import install
from serve.server.doctor import Check, broken
from tests.optimize.conftest import Optimize


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let some packages be missing."""

    def hide(*names: str) -> None:
        imported, stated = importlib.import_module, importlib.metadata.version

        def import_module(name: str) -> Any:
            if name in names:
                raise ModuleNotFoundError(f"No module named {name!r}")
            return imported(name)

        def version(name: str) -> str:
            if name in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return stated(name)

        monkeypatch.setattr(importlib, "import_module", import_module)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return hide


def checked() -> dict[str, Check]:
    return {check.name: check for check in doctor.checks()}


def test_this_machine_can_do_the_work_on_a_cpu(optimize: Optimize) -> None:
    ended = optimize("doctor", "--json")
    assert ended.code == 0
    result = json.loads(ended.out)
    found = {check["name"]: check for check in result["checks"]}
    assert all(check.keys() == {"name", "found", "wanted", "ok", "fix", "required"} for check in result["checks"])
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert found["torch"]["wanted"] == "<2.14,>=2.13"
    assert "CPUExecutionProvider" in found["onnxruntime on the CPU"]["found"]
    assert all(check["fix"] for check in result["checks"] if check["required"] and not check["ok"])


def test_a_missing_package_ends_with_5_and_its_command(absent: Any, optimize: Optimize) -> None:
    absent("torch_pruning")
    ended = optimize("doctor", "--json")
    assert ended.code == 5
    result = json.loads(ended.out)
    assert result["error"]["kind"] == "MachineError"
    missing = [check for check in result["checks"] if check["required"] and not check["ok"]]
    assert [check["name"] for check in missing] == ["torch-pruning"]
    assert "pip install" in missing[0]["fix"]
    assert "torch_pruning" in missing[0]["fix"]
    text = optimize("doctor")
    assert text.code == 5
    assert "BROKEN  torch-pruning" in text.out


def test_a_version_out_of_range_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0" if name == "torch" else stated(name))
    assert [check.name for check in broken(doctor.checks())] == ["torch"]


def test_a_missing_optional_package_is_no_fault(absent: Any) -> None:
    absent("openvino")
    found = doctor.checks()
    assert broken(found) == []
    openvino = next(check for check in found if check.name == "openvino")
    assert (openvino.ok, openvino.fix) == (False, install_line("openvino"))


def test_providers_are_asked_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # Without a GPU this list names CUDA all the same in the -gpu package.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    found, message = doctor.providers()
    assert "CPUExecutionProvider" in found
    assert message == ""

    def fail(*_args: object, **_named: object) -> None:
        raise RuntimeError("no such library")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    assert doctor.providers() == ([], "no such library")
    assert [check.name for check in broken(doctor.checks())] == ["onnxruntime on the CPU"]


def test_the_server_is_named_by_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia_pytriton-0.7.0.dist-info").mkdir()
    made = SimpleNamespace(site_packages=tmp_path, prefix=tmp_path)
    monkeypatch.setattr(install, "environment", lambda: made)
    assert checked()["server"].found == f"tritonserver 2.51.0 (24.10) in {tmp_path}"

    def absent() -> None:
        raise NotInstalled("the server is not installed", fix="run: serve install")

    monkeypatch.setattr(install, "environment", absent)
    server = checked()["server"]
    assert (server.ok, server.required) == (False, False)
    assert server.fix.startswith("serve install")


@pytest.mark.parametrize(
    ("script", "ok", "said"),
    [
        ("echo '580.95.05, NVIDIA H200'", True, "580.95.05, NVIDIA H200"),
        ("echo 'could not talk to the driver'; exit 9", False, "could not talk to the driver"),
    ],
)
def test_the_driver_is_asked(script: str, ok: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    driver = checked()["driver"]
    assert driver.ok == ok
    assert said in (driver.found if ok else driver.fix)


@pytest.mark.parametrize(
    ("version", "ok"), [("580.95.05", True), ("575.57.08", False), ("1000.1", True), ("[N/A]", False)]
)
def test_a_driver_and_its_cuda(version: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Check("driver", f"{version}, NVIDIA H200 | {version}, NVIDIA H200", "", True)
    monkeypatch.setattr(doctor, "gpu", lambda: [there])
    found = checked()["driver for CUDA 13"]
    assert (found.found, found.ok, bool(found.fix)) == (version, ok, not ok)


@pytest.mark.parametrize(
    ("version", "images"),
    [
        ("10.13.3.9", ["26.02", "26.01", "25.12", "25.11"]),
        ("10.13.3.9.post1", ["26.02", "26.01", "25.12", "25.11"]),
        ("10.7.0", ["24.12"]),
        ("10.7.0.23", ["24.12"]),
        ("10.1", []),
        ("11.1.0.1", []),
    ],
)
def test_a_plan_is_loaded_by_images_with_the_same_tensorrt(
    version: str, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "tensorrt" else stated(name))
    found = checked()["triton image"]
    assert found.found == ", ".join(f"{image}-trtllm-python-py3" for image in images)
    assert found.ok == bool(images)
    assert bool(found.fix) != found.ok
