"""TensorRT: from a bundle to a Triton repository with an engine, and one with the TensorRT accelerator of ONNX Runtime.

An engine belongs to the GPU model and the TensorRT version that built it, so what is written here is the recipe of the
build: the ONNX file, a script for trtexec and one for Polygraphy, and both configs. Engines are strongly typed: every
layer computes in the type that the graph states.
"""

import importlib.util
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.errors import MachineError
from loadtest.tensors import fewest
from optimize.bundle import Bundle, replacing
from optimize.errors import BadBundle, BadGraph
from optimize.tensorrt import rules
from optimize.tensorrt.rules import Finding
from serve import gpu, model_config, settings
from serve.target import LARGEST_BATCH, Target

SCRIPTS = ("build.py", "build.sh")

BUILD_PY = '''"""Builds the engine of {name} with Polygraphy, on the machine and in the image that will serve it."""

from pathlib import Path

from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

PROFILE = {{
{profile}
}}

folder = Path(__file__).resolve().parent
cache = str(folder / "timing.cache")
profile = Profile()
for tensor, (least, typical, most) in PROFILE.items():
    profile.add(tensor, min=least, opt=typical, max=most)
build = EngineBytesFromNetwork(
    NetworkFromOnnxPath(str(folder / "{onnx}"), strongly_typed=True),
    # As trtexec does, and only where the graph is float32: products of float32 with mantissas of 10 bits.
    config=CreateConfig(profiles=[profile], tf32=True, load_timing_cache=cache),
    save_timing_cache=cache,
)
(folder / "{plan}").write_bytes(build())
'''

BUILD_SH = """#!/bin/sh
# Builds the engine of {name} with trtexec, on the machine and in the image that will serve it. Further options of
# trtexec may follow. --stronglyTyped is what TensorRT 10 needs to be told, and the only way of TensorRT 11.
set -eu
cd "$(dirname "$0")"
trtexec {options} "$@"
"""


@dataclass(frozen=True)
class Written:
    """What stands in the folder.

    Args:
        folder: where.
        files: paths in it, relative to it.
        findings: what is left of the rules' findings: warnings.
        built: whether the engine is there as well.
        reason: why it is not; empty where it is.
    """

    folder: Path
    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    built: bool
    reason: str

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "findings": rules.document(list(self.findings)),
            "built": self.built,
            "reason": self.reason,
        }


def write(bundle: Bundle, folder: Path, *, build: bool = True) -> Written:
    """Write the repositories `plan/` and `onnx/` and both build scripts to `folder`, whole or not at all.

    The engine is built too where this machine has TensorRT, Polygraphy and a GPU.

    Args:
        bundle: has an ONNX file.
        folder: must not exist, or hold what this function wrote, or nothing.
        build: build the engine where that is possible.

    Raises:
        BadBundle: the bundle has no ONNX file, or `folder` holds something else.
        BadGraph: the graph breaks a rule of TensorRT; `partial` holds all findings.
        MachineError: the build was tried and failed.
    """
    if bundle.graph is None:
        raise BadBundle("there is no ONNX file in it", where=str(bundle.folder or ""), fix="run optimize export first")
    if folder.exists() and any(folder.iterdir()) and not (folder / SCRIPTS[0]).is_file():
        raise BadBundle("holds something else", where=str(folder), fix="name another --output")
    findings = rules.check(bundle.graph)
    _refuse(findings, bundle.graph)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    reason = missing() if build else "it was not asked for"
    with replacing(folder) as temporary:
        _write(bundle, bundle.graph, temporary)
        if not reason:
            _build(temporary)
        files = tuple(sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()))
    return Written(folder, files, tuple(findings), not reason, reason)


def missing() -> str:
    """Return why no engine can be built on this machine; empty where one can."""
    for package in ("tensorrt", "polygraphy"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    import torch

    return "" if torch.cuda.is_available() else "there is no GPU"


def _refuse(findings: Sequence[Finding], graph: Path) -> None:
    errors = [finding for finding in findings if finding.level == "error"]
    if not errors:
        return
    first, more = errors[0], f" ({len(errors) - 1} more findings)" if len(errors) > 1 else ""
    refusal = BadGraph(f"TensorRT cannot take it: {first.node}: {first.what}{more}", where=str(graph), fix=first.fix)
    refusal.partial = {"findings": rules.document(list(findings))}
    raise refusal


def _write(bundle: Bundle, graph: Path, folder: Path) -> None:
    workload = bundle.workload
    name, inputs = workload.name, workload.inputs
    plan, onnx = folder / "plan" / name, folder / "onnx" / name
    for place in (plan / "1", onnx / "1"):
        place.mkdir(parents=True)
    for file in graph.parent.glob(f"{graph.name}*"):
        shutil.copyfile(file, onnx / "1" / file.name)
    shapes = gpu.profile(inputs)
    paths = {"onnx": f"onnx/{name}/1/{graph.name}", "plan": f"plan/{name}/1/{gpu.PLAN}"}
    lines = (f"    {tensor!r}: {tuple(sizes.values())!r}," for tensor, sizes in shapes.items())
    (folder / "build.py").write_text(BUILD_PY.format(name=name, profile="\n".join(lines), **paths))
    options = [f"--onnx={paths['onnx']}", f"--saveEngine={paths['plan']}", "--stronglyTyped", "--skipInference"]
    options += ["--timingCacheFile=timing.cache", *_shape_options(shapes)]
    script = folder / "build.sh"
    script.write_text(BUILD_SH.format(name=name, options=" \\\n  ".join(shlex.quote(option) for option in options)))
    script.chmod(0o755)
    config = _config(bundle, graph)
    (plan / "config.pbtxt").write_text(model_config.text(gpu.engine(config)))
    (onnx / "config.pbtxt").write_text(model_config.text(config))


def _shape_options(shapes: dict[str, dict[str, tuple[int, ...]]]) -> list[str]:
    sizes = gpu.SIZES if shapes else ()
    return [f"--{size}Shapes={gpu.joined_shapes(shapes, size)}" for size in sizes]


def _config(bundle: Bundle, graph: Path) -> Any:
    """Return the config with the TensorRT accelerator; the server batches as far as the profile reaches."""
    from optimize.endpoint import output_specs
    from optimize.predict import OnnxPredictor

    workload = bundle.workload
    rng = np.random.default_rng(0)
    with OnnxPredictor(graph) as predictor:
        answers = predictor.predict(
            {spec.name: spec.generate(rng, batch=max(2, fewest(workload.inputs))) for spec in workload.inputs}
        )
    outputs = output_specs(workload, graph, answers)
    largest = min(spec.shape(size="maximum")[0] for spec in workload.inputs)
    target = Target(device="cuda", batch=(1, min(largest, LARGEST_BATCH)))
    lowest = rules.precision(graph)
    # A graph with FP8 states it itself, in its Q/DQ pairs.
    asked = {"accelerator": "tensorrt", "precision": "FP32" if lowest == "FP8" else lowest}
    return model_config.build(workload.name, workload.inputs, outputs, target, [1], settings.read(asked, workload.name))


def _build(folder: Path) -> None:
    done = subprocess.run([sys.executable, str(folder / "build.py")], capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise MachineError(
            f"TensorRT did not build the engine: {words[-1] if words else f'exit code {done.returncode}'}",
            fix="leave the build out with --no-build, and run build.sh of the folder where its whole output is seen",
        )
