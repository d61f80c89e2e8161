"""TensorRT: from a bundle to a Triton repository with an engine, and one with the TensorRT accelerator of ONNX Runtime.

An engine belongs to the GPU model and the TensorRT version that built it, so what is written here is the recipe of the
build: the ONNX file, a script for trtexec and one for Polygraphy, and both configs. Engines are strongly typed: every
layer computes in the type that the graph states.
"""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelathe.commandline import install_line
from modelathe.errors import MachineError
from modelathe.tensors import generated
from optimize.model.errors import BadBundle
from optimize.source.workload import fewest
from optimize.step.bundle import Bundle, replacing
from optimize.tensorrt import compiler, rules
from optimize.tensorrt.compiler import Compiled
from optimize.tensorrt.rules import Finding
from serve.config import gpu, model_config, settings
from serve.config.target import LARGEST_BATCH, Target
from serve.tensorrt import ask
from serve.tensorrt.capability import USUAL

FINDINGS = "findings.json"
"""What the rules found; with `build.py`, which older folders have alone, the mark of a folder that this wrote."""

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
        compiled: what NVIDIA's compiler made of the graph; None where it was not asked.
        unasked: why it was not; empty where it was.
        taken: of a partial graph, how many nodes TensorRT takes, of how many, and in how many parts.
    """

    folder: Path
    files: tuple[str, ...]
    findings: tuple[Finding, ...]
    built: bool
    reason: str
    compiled: Compiled | None
    unasked: str
    taken: tuple[int, int, int] | None

    def document(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "findings": rules.document(list(self.findings)),
            "built": self.built,
            "reason": self.reason,
            "compiled": self.compiled and self.compiled.document(),
            "unasked": self.unasked,
            "taken": self.taken,
        }


def write(
    bundle: Bundle,
    folder: Path,
    *,
    build: bool = True,
    capabilities: Sequence[str] = USUAL,
    partial: bool = False,
) -> Written:
    """Write the repositories `plan/` and `onnx/` and both build scripts to `folder`, whole or not at all.

    The graph is compiled by TensorRT for RTX where that is installed, its engine written to `rtx/` and what it says to
    a log beside the folder. Triton's engine is built too where this machine has TensorRT, Polygraphy and a GPU.

    Args:
        bundle: has an ONNX file.
        folder: must not exist, or hold what this function wrote, or nothing.
        build: build Triton's engine where that is possible.
        capabilities: what to compile for, of `CAPABILITIES`; nothing is not to compile.
        partial: write `onnx/` alone, for a graph of which ONNX Runtime computes the operators that TensorRT lacks.

    Raises:
        BadBundle: the bundle has no ONNX file, or `folder` holds something else.
        BadGraph: the graph breaks a rule of TensorRT, or the compiler refuses it; `partial` holds all findings.
        MachineError: the build or the compiler was tried and failed.
    """
    if bundle.graph is None:
        raise BadBundle("there is no ONNX file in it", where=str(bundle.folder or ""), fix="run optimize export first")
    ours = any((folder / mark).is_file() for mark in (FINDINGS, "build.py"))
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise BadBundle("holds something else", where=str(folder), fix="name another --output")
    findings = rules.check(bundle.graph)
    rules.refuse(findings, bundle.graph, partial=partial)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    reason = "it was not asked for" if partial or not build else missing()
    unasked, compiled, taken = _unasked(capabilities), None, None
    with replacing(folder) as temporary:
        log = folder.with_name(f"{folder.name}{compiler.LOG}")
        if partial and not unasked:
            taken = compiler.taken(bundle.graph, log)
        elif not unasked:
            engine = temporary / "rtx" / f"{bundle.workload.name}.engine"
            engine.parent.mkdir()
            compiled = compiler.compile(bundle.graph, bundle.workload.inputs, engine, log, capabilities)
        (temporary / FINDINGS).write_text(json.dumps(rules.document(findings), indent=2))
        _write_onnx(bundle, bundle.graph, temporary)
        if not partial:
            _write_plan(bundle, bundle.graph, temporary)
        if not reason:
            _build(temporary)
        files = tuple(sorted(str(file.relative_to(temporary)) for file in temporary.rglob("*") if file.is_file()))
    return Written(folder, files, tuple(findings), not reason, reason, compiled, unasked, taken)


def _unasked(capabilities: Sequence[str]) -> str:
    if not capabilities:
        return "it was not asked for"
    return "" if ask.there() else f"the compiler is not installed: {install_line('tensorrt')}"


def missing() -> str:
    """Return why no engine can be built on this machine; empty where one can."""
    for package in ("tensorrt", "polygraphy"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    import torch

    return "" if torch.cuda.is_available() else "there is no GPU"


def _write_onnx(bundle: Bundle, graph: Path, folder: Path) -> None:
    place = folder / "onnx" / bundle.workload.name
    (place / "1").mkdir(parents=True)
    for file in graph.parent.glob(f"{graph.name}*"):
        shutil.copyfile(file, place / "1" / file.name)
    (place / "config.pbtxt").write_text(model_config.text(_config(bundle, graph)))


def _write_plan(bundle: Bundle, graph: Path, folder: Path) -> None:
    name, inputs = bundle.workload.name, bundle.workload.inputs
    place = folder / "plan" / name
    (place / "1").mkdir(parents=True)
    shapes = gpu.profile(inputs)
    paths = {"onnx": f"onnx/{name}/1/{graph.name}", "plan": f"plan/{name}/1/{gpu.PLAN}"}
    lines = (f"    {tensor!r}: {tuple(sizes.values())!r}," for tensor, sizes in shapes.items())
    (folder / "build.py").write_text(BUILD_PY.format(name=name, profile="\n".join(lines), **paths))
    options = [f"--onnx={paths['onnx']}", f"--saveEngine={paths['plan']}", "--stronglyTyped", "--skipInference"]
    options += ["--timingCacheFile=timing.cache", *_shape_options(shapes)]
    script = folder / "build.sh"
    script.write_text(BUILD_SH.format(name=name, options=" \\\n  ".join(shlex.quote(option) for option in options)))
    script.chmod(0o755)
    config = model_config.parse((folder / "onnx" / name / "config.pbtxt").read_text())
    (place / "config.pbtxt").write_text(model_config.text(gpu.engine(config)))


def _shape_options(shapes: dict[str, dict[str, tuple[int, ...]]]) -> list[str]:
    sizes = gpu.SIZES if shapes else ()
    return [f"--{size}Shapes={gpu.joined_shapes(shapes, size)}" for size in sizes]


def _config(bundle: Bundle, graph: Path) -> Any:
    """Return the config with the TensorRT accelerator; the server batches as far as the profile reaches."""
    from optimize.predict.onnxruntime import OnnxPredictor
    from optimize.predict.specs import output_specs

    workload = bundle.workload
    with OnnxPredictor(graph) as predictor:
        answers = predictor.predict(generated(workload.inputs, max(2, fewest(workload.inputs))))
    outputs = output_specs(workload, graph, answers)
    largest = min(spec.shape(size="maximum")[0] for spec in workload.inputs)
    target = Target(device="cuda", batch=(1, min(largest, LARGEST_BATCH)))
    asked = {"accelerator": "tensorrt", "precision": rules.allowed(graph)}
    return model_config.build(workload.name, workload.inputs, outputs, target, [1], settings.read(asked, workload.name))


def _build(folder: Path) -> None:
    done = subprocess.run([sys.executable, str(folder / "build.py")], capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise MachineError(
            f"TensorRT did not build the engine: {words[-1] if words else f'exit code {done.returncode}'}",
            fix="leave the build out with --no-build, and run build.sh of the folder where its whole output is seen",
        )
