"""Doctor: what this machine has of what modelathe works with, asked of the things themselves."""

import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable

from modelathe.commandline import install_line
from optimize.machine import cpu
from optimize.model.errors import first_line
from serve.config import releases
from serve.server.doctor import Check, gpu, server

PYTHON = ((3, 11), (3, 13))
REQUIRED = {
    "torch": "",
    "onnx": "",
    "onnx-ir": "onnx_ir",
    "onnxscript": "",
    "onnxruntime": "",
    "torch-pruning": "torch_pruning",
    "torchao": "",
    "safetensors": "",
    "tritonclient": "",
}
"""Distributions that the CPU work needs, and what they are imported as where that differs."""
OPTIONAL = {
    "openvino": install_line("openvino"),
    "nncf": install_line("openvino"),
    "transformers": install_line("huggingface"),
    "tensorrt-rtx-cu13": f"{install_line('tensorrt')}, which compiles on any machine",
    "tensorrt": "pip install tensorrt, on a machine with an NVIDIA GPU",
    "polygraphy": "pip install polygraphy, on a machine with an NVIDIA GPU",
}
DRIVER = "580.65.06"
"""The oldest driver on Linux for CUDA 13, which torch, ONNX Runtime and TensorRT for RTX are built for."""
FEATURES = {
    "avx512_vnni": "INT8 products without overflow, and fast",
    "avx_vnni": "the same without AVX-512",
    "amx_int8": "INT8 in tiles",
    "avx512_bf16": "bfloat16 products",
    "amx_bf16": "bfloat16 in tiles",
}


def checks() -> list[Check]:
    """Return everything that was looked for, what the CPU work needs first."""
    kinds: tuple[Callable[[], list[Check]], ...] = (
        _python,
        _packages,
        _session,
        server,
        _cpu,
        gpu,
        _driver,
        _optional,
        _images,
    )
    return [check for kind in kinds for check in kind()]


def _python() -> list[Check]:
    version = sys.version_info[:2]
    wanted = " to ".join(".".join(map(str, bound)) for bound in PYTHON)
    fix = "" if PYTHON[0] <= version <= PYTHON[1] else "make the environment with python3.12 -m venv"
    return [Check("python", platform.python_version(), wanted, not fix, fix, required=True)]


def _packages() -> list[Check]:
    return [_package(name, module or name) for name, module in REQUIRED.items()]


def _package(name: str, module: str) -> Check:
    """Import a package: one that is installed may still not start."""
    from packaging.specifiers import SpecifierSet

    from optimize.graph.graph import quiet

    fix, wanted = install_line("optimize"), _wanted(name)
    try:
        with quiet():
            loaded = importlib.import_module(module)
    except Exception as error:
        message = first_line(error) or type(error).__name__
        return Check(name, "", wanted, False, f"{fix}  ({message})", required=True)
    version = _version(name) or str(getattr(loaded, "__version__", ""))
    fits = not version or SpecifierSet(wanted).contains(version, prereleases=True)
    return Check(name, version, wanted, fits, "" if fits else fix, required=True)


def _version(name: str) -> str:
    # onnxruntime is installed under one of two names.
    for distribution in (name, f"{name}-gpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _wanted(name: str) -> str:
    """Return the range of versions that modelathe declares for a package; empty where it is not installed itself."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in importlib.metadata.requires("modelathe") or []]
    except importlib.metadata.PackageNotFoundError:
        return ""
    return next((str(each.specifier) for each in declared if each.name in (name, f"{name}-gpu")), "")


def _session() -> list[Check]:
    """Ask a session which providers it runs on: the list of available ones names those that cannot start as well."""
    found, message = providers()
    cuda = "CUDAExecutionProvider" in found
    return [
        Check(
            "onnxruntime on the CPU",
            ", ".join(found),
            "a session on CPUExecutionProvider",
            "CPUExecutionProvider" in found,
            "" if "CPUExecutionProvider" in found else f"pip install --force-reinstall onnxruntime  ({message})",
            required=True,
        ),
        Check(
            "onnxruntime on a GPU",
            "CUDAExecutionProvider" if cuda else "",
            'a session on CUDAExecutionProvider, for device = "cuda"',
            cuda,
            "" if cuda else f"a GPU with a driver for CUDA 13, and {install_line('optimize')}",
        ),
    ]


def providers() -> tuple[list[str], str]:
    """Return the providers that a session on a tiny model really got, and why it got none."""
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper

        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", value[:1], value[1:])
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.checker.check_model(model)
        # A provider that cannot start says so at length.
        onnxruntime.set_default_logger_severity(4)
        wanted = [name for name in ("CUDAExecutionProvider",) if name in onnxruntime.get_available_providers()]
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[*wanted, "CPUExecutionProvider"])
        return list(session.get_providers()), ""
    except Exception as error:
        return [], first_line(error) or type(error).__name__
    finally:
        if "onnxruntime" in sys.modules:
            sys.modules["onnxruntime"].set_default_logger_severity(2)


def lacks_gpu() -> str:
    """Return why nothing can run on a GPU here, or an empty text: a session is asked, which falls back in silence."""
    import torch  # noqa: F401  a CUDA build of it brings the libraries that onnxruntime looks for

    if "CUDAExecutionProvider" in providers()[0]:
        return ""
    return "a GPU, but onnxruntime's CUDA provider does not start" if has_gpu() else "no GPU"


def has_gpu() -> bool:
    """Say whether torch or the driver knows a GPU here, whatever can be done with it."""
    import torch

    return torch.cuda.is_available() or any(check.ok for check in gpu())


def _cpu() -> list[Check]:
    flags = cpu.flags()
    if not flags:
        return [Check("cpu", platform.processor() or platform.machine(), "flags in /proc/cpuinfo", False)]
    return [
        Check(f"cpu {name}", "there" if name in flags else "", use, name in flags) for name, use in FEATURES.items()
    ]


def _optional() -> list[Check]:
    found = {name: _version(name) for name in OPTIONAL}
    return [
        Check(name, version, "optional", bool(version), "" if version else OPTIONAL[name])
        for name, version in found.items()
    ]


def _driver() -> list[Check]:
    """Say whether the driver is new enough for the CUDA that torch, ONNX Runtime and the compiler are built for."""
    wanted = f"{DRIVER} or newer, for CUDA 13"
    there = next((check for check in gpu() if check.ok), None)
    if there is None:
        return [Check("driver for CUDA 13", "not checked: no driver here", wanted, False)]
    version = there.found.partition(",")[0]
    fits = _numbers(version) >= _numbers(DRIVER)
    fix = "" if fits else "install a newer driver of NVIDIA's, or packages for CUDA 12"
    return [Check("driver for CUDA 13", version, wanted, fits, fix)]


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _images() -> list[Check]:
    """Say which image of Triton loads a plan that the TensorRT of this machine builds."""
    wanted = "the same TensorRT as the one that builds the plan"
    version = _version("tensorrt")
    if not version:
        return [Check("triton image", "not checked: no tensorrt here", wanted, False)]
    fits = [release for release, theirs in releases.TENSORRT.items() if releases.same(version, theirs)]
    found = ", ".join(f"{release}-trtllm-python-py3" for release in fits)
    fix = f"TensorRT {version} is in no image of the table; build the plan in the image that will serve it"
    return [Check("triton image", found, wanted, bool(fits), "" if fits else fix)]
