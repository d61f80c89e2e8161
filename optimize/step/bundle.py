"""Bundle: a model on disk between commands. A folder with `bundle.json`, `weights.safetensors`, perhaps `model.onnx`.

A pruned model is rebuilt from the user's own code: the workload's model function runs again, the structure record
resizes what pruning changed, and the weights are loaded into it. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from modelathe import files
from modelathe.commandline import document
from modelathe.tensors import TensorSpec, generated
from optimize.model import state
from optimize.model.errors import BadBundle
from optimize.model.structure import rebuild, structure, unsaved
from optimize.predict.module import TorchPredictor
from optimize.source.load import file_of, load_workload
from optimize.source.workload import Workload, fewest
from optimize.step import exchange
from optimize.step.key import Key
from serve.repository import scratch

FORMAT = 3
NO_KEY = Key()
KEPT = 64
"""Numbers of each output that a bundle keeps, to know its model again."""
DESCRIPTION, WEIGHTS, GRAPH = "bundle.json", "weights.safetensors", "model.onnx"
BUFFERS = "buffers.safetensors"
"""The buffers that torch does not count to the weights and that differ from those that the user's code builds."""


@dataclass(frozen=True)
class Bundle:
    """A workload's model in some state of its treatment.

    Args:
        workload: what the user brought.
        module: the torch model; after a graph step, the one that was exported.
        graph: the ONNX file, None before the export.
        lineage: one entry for each step so far, oldest first: the step's name, config, seed and measurements.
        folder: where it was saved; None for one that only lives in memory.
        key: what it was made from; empty where nobody asked.
    """

    workload: Workload
    module: nn.Module
    graph: Path | None = None
    lineage: tuple[dict[str, Any], ...] = ()
    folder: Path | None = None
    key: Key = NO_KEY

    @property
    def runtime(self) -> str:
        """What runs its ONNX file: the runtime of the target that its last step worked for."""
        return str(self.lineage[-1].get("runtime", "onnxruntime")) if self.lineage else "onnxruntime"


def save(bundle: Bundle, folder: Path, key: Key | None = None) -> Bundle:
    """Write `bundle` to `folder`, whole or not at all, in place of a bundle that is there.

    Args:
        bundle: it will name the file or module that its workload came from, if any.
        folder: must not exist, or hold a bundle or nothing.
        key: kept with it, by which a run knows its own steps again; the bundle's own unless given.

    Raises:
        BadBundle: `folder` is a file or holds something else than a bundle, or the module keeps state that is no tensor
            and not what the user's code builds.
    """
    folder = folder.absolute()
    bundle = replace(bundle, key=key or bundle.key)
    check(folder)
    with replacing(folder) as temporary:
        original = bundle.workload.build(student_of(bundle.lineage))
        _save_weights(bundle.module, original, temporary)
        if bundle.graph:
            for file in bundle.graph.parent.glob(f"{bundle.graph.name}*"):
                shutil.copyfile(file, temporary / file.name.replace(bundle.graph.name, GRAPH, 1))
        description = document(
            bundle_format=FORMAT,
            name=bundle.workload.name,
            inputs=[spec.document() for spec in bundle.workload.inputs],
            workload={**_describe_source(bundle.workload, folder), "inferred": [*bundle.workload.inferred]},
            structure=structure(bundle.module, original),
            lineage=list(bundle.lineage),
            key=bundle.key.digest,
            made_of=dict(bundle.key.parts),
            answers=_answers(bundle.module, bundle.workload),
            digests={file.name: digest(file) for file in sorted(temporary.iterdir())},
        )
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2))
    return replace(bundle, folder=folder, graph=folder / GRAPH if bundle.graph else None)


def retell(bundle: Bundle, lineage: tuple[dict[str, Any], ...]) -> Bundle:
    """Return a saved bundle with another lineage, which its folder then holds too."""
    if lineage == bundle.lineage:
        return bundle
    assert bundle.folder is not None
    description = json.loads((bundle.folder / DESCRIPTION).read_text())
    files.write(bundle.folder / DESCRIPTION, json.dumps({**description, "lineage": list(lineage)}, indent=2))
    return replace(bundle, lineage=lineage)


def check(folder: Path) -> None:
    """Say before the work begins that no bundle could be saved to `folder`; makes the folder that it is in.

    Raises:
        BadBundle: it is a file, holds something else than a bundle, or cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file()):
        raise BadBundle("exists and is not a bundle", where=str(folder), fix="name another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise BadBundle("its folder cannot be written", where=str(folder), fix="check permissions, or name another")


def load(folder: Path, workload: Workload | None = None, *, unnamed: Workload | None = None) -> Bundle:
    """Read a bundle and check it: format, key, digests, and that the user's code still builds the same model.

    Args:
        folder: as `save` left it.
        workload: used in place of the one that the bundle names.
        unnamed: used where the bundle names none, since its workload was made in Python and has no file.

    Raises:
        BadBundle: incomplete, changed, of another format, or the user's code builds another model now.
        BadWorkload: the workload that it names cannot be loaded.
    """
    description = describe(folder)
    source = description["workload"]["source"]
    if workload is None and not source:
        if unnamed is None:
            raise BadBundle(
                "its workload was made in Python and has no file",
                where=str(folder),
                fix="put the workload into a file and make the bundle again with path/to/file.py:function; or, where "
                f"it was made: optimize.evaluate({str(folder)!r}, workload=…), and so for optimize.compare",
            )
        workload = unnamed
    if workload is None:
        workload = load_workload(_resolve_source(source, folder))
    workload = _ranged(workload, description["inputs"])
    original = workload.build(student_of(description["lineage"]))
    module = rebuild(original, description["structure"], str(folder))
    try:
        state.load(module, load_file(folder / WEIGHTS))
        _load_buffers(module, description["structure"], folder)
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise BadBundle(
            f"its weights do not fit the model that {workload.source or workload.name} builds",
            where=str(folder),
            fix="bring the workload file back to what it was, or make the bundle again",
        ) from error
    _check_answers(_answers(module.eval(), workload), description["answers"], str(folder))
    graph = folder / GRAPH
    lineage, key = tuple(description["lineage"]), Key(description["made_of"])
    return Bundle(workload, module, graph if graph.is_file() else None, lineage, folder, key)


def _ranged(workload: Workload, documents: Sequence[Mapping[str, Any]]) -> Workload:
    """Return the workload whose inputs have the ranges of generated values that the bundle was made with."""
    values = {spec.name: spec.values for spec in map(TensorSpec.from_document, documents)}
    inputs = [replace(spec, values=spec.values or values.get(spec.name)) for spec in workload.inputs]
    return replace(workload, inputs=tuple(inputs))


def describe(folder: Path) -> dict[str, Any]:
    """Return `bundle.json` after checking the format version and every digest, without running user code.

    Raises:
        BadBundle: no bundle, another format, or a file that is missing or was changed.
    """
    try:
        description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadBundle("is not a bundle", where=str(folder), fix="give a folder that optimize has written") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadBundle("its bundle.json is damaged", where=str(folder), fix="make the bundle again") from error
    if not isinstance(description, dict) or description.get("bundle_format") != FORMAT:
        raise BadBundle("is a bundle of another format", where=str(folder), fix="make it again with this version")
    description.setdefault("modelathe", description.get("lathe", "unknown"))  # the project's former name
    kinds = {"workload": dict, "structure": dict, "lineage": list, "digests": dict, "made_of": dict, "answers": dict}
    whole = all(isinstance(description.get(key), kind) for key, kind in kinds.items())
    if not whole or description.get("key") != Key(description["made_of"]).digest:
        raise BadBundle("its bundle.json is damaged", where=str(folder), fix="make the bundle again")
    for name, wanted in description["digests"].items():
        file = folder / name
        if not file.is_file():
            raise BadBundle(f"{name} is missing", where=str(folder), fix="make the bundle again")
        if digest(file) != wanted:
            raise BadBundle(f"{name} was changed after it was written", where=str(folder), fix="make the bundle again")
    return description


def student_of(lineage: Sequence[Mapping[str, Any]]) -> str:
    """Return which of the workload's students the model is: that of the last step that brought one in, or none."""
    named = [entry.get("config", {}).get("student") for entry in lineage]
    return next((name for name in reversed(named) if name), "")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place at the end; on an error nothing has happened."""
    with scratch.folder(folder.parent, f".{folder.name}.saving-") as temporary:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            exchange.swap(temporary, folder)
        else:
            files.place(temporary, folder)


def _answers(module: nn.Module, workload: Workload) -> dict[str, list[float]]:
    """Return the first numbers that the model makes of generated inputs, by output: float outputs only."""
    with TorchPredictor(module, workload.outputs) as predictor:
        outputs = predictor.predict(generated(workload.inputs, max(2, fewest(workload.inputs))))
    return {name: array.ravel()[:KEPT].tolist() for name, array in outputs.items() if array.dtype.kind == "f"}


def _check_answers(now: Mapping[str, list[float]], then: Mapping[str, list[float]], where: str) -> None:
    """Find a change of the user's code that the weights fit as before, such as another activation.

    Raises:
        BadBundle: an output differs by more than two machines would.
    """
    for name, wanted in then.items():
        scale = float(np.nan_to_num(np.abs(wanted)).max(initial=0.0))
        close = np.shape(now.get(name, ())) == np.shape(wanted) and np.allclose(
            now[name], wanted, rtol=1e-2, atol=1e-3 * scale, equal_nan=True
        )
        if not close:
            raise BadBundle(
                f"the user's code makes another model of its weights now: {name!r} differs",
                where=where,
                fix="bring the code back to what it was, or make the bundle again",
            )


def _save_weights(module: nn.Module, original: nn.Module, folder: Path) -> None:
    before = state.extras(original)
    for name, value in state.extras(module).items():
        if before.get(name) != value:
            raise BadBundle(
                f"a step has changed the extra state {name!r}, which is no tensor",
                where=type(module).__name__,
                fix="let get_extra_state return a tensor; a bundle holds nothing else",
            )
    built = unsaved(original)
    buffers = {
        name: buffer.clone(memory_format=torch.contiguous_format)
        for name, buffer in unsaved(module).items()
        if name not in built or not torch.equal(built[name], buffer)
    }
    try:
        save_file(state.tensors(module), folder / WEIGHTS)
        if buffers:
            save_file(buffers, folder / BUFFERS)
    except SafetensorError as error:
        # The library gives the operating system's error as text only.
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, str(error), str(folder)) from error


def _load_buffers(module: nn.Module, record: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Set the buffers that are not among the weights, in place.

    Raises:
        KeyError: the file has one that the module has not, or lacks one that was resized.
        RuntimeError: one has another shape.
    """
    saved = load_file(folder / BUFFERS) if (folder / BUFFERS).is_file() else {}
    buffers = unsaved(module)
    for name, tensor in saved.items():
        buffers[name].copy_(tensor)
    resized = {
        f"{layer}.{key}".removeprefix(".") for layer, change in record.items() for key in change.get("tensors", ())
    }
    if missing := (resized & buffers.keys()) - saved.keys():
        raise KeyError(*missing)


def _describe_source(workload: Workload, folder: Path) -> dict[str, str]:
    if not workload.source:
        return {"source": "", "digest": ""}
    place, _, name = workload.source.rpartition(":")
    file = file_of(workload.source)
    known = digest(file) if file and file.is_file() else ""
    if place.endswith(".py"):
        # Relative to the bundle, so that a tree with both can be moved.
        place = os.path.relpath(Path(place).resolve(), folder.resolve())
    elif name.endswith("/"):
        # A Hugging Face folder.
        return {"source": f"{os.path.relpath(Path(workload.source).resolve(), folder.resolve())}/", "digest": known}
    return {"source": f"{place}:{name}", "digest": known}


def _resolve_source(source: str, folder: Path) -> str:
    place, _, name = source.rpartition(":")
    relative = source if source.endswith("/") else place
    if not relative.endswith((".py", "/")):
        return source
    path = (folder.resolve() / relative).resolve()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}/" if relative == source else f"{shown}:{name}"
