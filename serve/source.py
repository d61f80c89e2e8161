"""Source: what `serve add` publishes: an ONNX file, a bundle of `optimize`, or a version of another repository."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.errors import UsageError
from loadtest.tensors import BATCH, Dim, TensorSpec
from serve import onnx_file, repository
from serve.errors import BadRepository
from serve.target import Target

if TYPE_CHECKING:
    from onnx import ValueInfoProto

BUNDLE = "bundle.json"
WRITTEN = ("model", "number", "inputs", "outputs", "kept", "target", "serve", "config", "digests", "lived", "failed")
"""Keys of a lineage that belong to one version in one repository."""


@dataclass(frozen=True)
class Source:
    """A model and what is known of it.

    Args:
        onnx: the file.
        inputs: the specs of its inputs.
        outputs: the specs of its outputs.
        name: of the model, where it has one.
        target: what it was made for, where that is known.
        settings: how it was served, where it was.
        lineage: what to write into the new version's lineage.
    """

    onnx: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str = ""
    target: Target | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)


def load(path: Path, dims: Mapping[str, Dim]) -> Source:
    """Return what `path` holds.

    Args:
        path: an ONNX file, the folder of a bundle, or that of a version with a lineage.
        dims: ranges of the dims that change size, by their names in the graph.

    Raises:
        BadRepository: there is nothing of that kind, or its files changed after they were written.
        UsageError: the range of a dim is not known, or one is given that would not be used.
    """
    if (path / repository.LINEAGE).is_file():
        found = _from_version(path)
    elif (path / BUNDLE).is_file():
        found = _from_bundle(path, dims)
    elif path.is_file():
        inputs, outputs = _specs(path, dims)
        found = Source(path, inputs, outputs, lineage=_origin(path, path))
    else:
        raise BadRepository(
            "is no model", where=str(path), fix="give an ONNX file, a bundle of optimize, or a version's folder"
        )
    used = {dim for spec in (*found.inputs, *found.outputs) for dim in spec.dims if isinstance(dim, Dim)}
    if unused := sorted(set(dims.values()) - used, key=str):
        raise UsageError(
            f"--dim {unused[0].name} would have no effect",
            where=str(path),
            fix=f"its dims that change size are {', '.join(sorted({dim.name for dim in used})) or 'none'}; those of a "
            "version stay as they are",
        )
    return found


def _from_version(path: Path) -> Source:
    place, model, number = path.absolute().parent.parent, path.absolute().parent.name, path.name
    if not number.isdigit():
        raise BadRepository("is not the folder of a version", where=str(path), fix="give REPOSITORY/MODEL/NUMBER")
    lineage = repository.read_lineage(place, model, int(number))
    if "kind" in lineage:
        raise BadRepository("belongs to a pipeline", where=str(path), fix="make it anew there: serve pipeline")
    repository.verify_version(place, model, int(number), lineage)
    kept = lineage.get("kept", {})
    stated = ([*lineage[kind], *kept.get(kind, [])] for kind in ("inputs", "outputs"))
    inputs, outputs = (tuple(map(TensorSpec.from_document, specs)) for specs in stated)
    onnx = path / repository.MODEL_FILE
    own = {key: value for key, value in lineage.items() if key not in WRITTEN}
    target = Target(**lineage["target"])
    return Source(onnx, inputs, outputs, model, target, lineage.get("serve", {}), {**own, **_origin(path, onnx)})


def _from_bundle(path: Path, dims: Mapping[str, Dim]) -> Source:
    try:
        described = json.loads((path / BUNDLE).read_text())
        known = [TensorSpec.from_document(document) for document in described["inputs"]]
        digests, name, history = described["digests"], described["name"], described["lineage"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadRepository("is not a bundle of this version", where=str(path), fix="make it again") from None
    onnx = path / repository.MODEL_FILE
    if not onnx.is_file():
        raise BadRepository("there is no ONNX file in it", where=str(path), fix="run optimize export first")
    if repository.digest(onnx) != digests.get(onnx.name):
        raise BadRepository("was changed after it was written", where=str(onnx), fix="make the bundle again")
    ranges = {dim.name: dim for spec in known for dim in spec.dims if isinstance(dim, Dim)}
    inputs, outputs = _specs(onnx, {**ranges, **dims})
    values = {spec.name: spec.values for spec in known}
    inputs = tuple(replace(spec, values=values.get(spec.name)) for spec in inputs)
    return Source(onnx, inputs, outputs, name, lineage={"lineage": history, **_origin(path, onnx)})


def _origin(path: Path, onnx: Path) -> dict[str, Any]:
    return {"source": {"path": str(path.absolute()), "digest": repository.digest(onnx)}}


def _specs(path: Path, dims: Mapping[str, Dim]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the specs of an ONNX file; where the first dim of every tensor changes size, that is the batch axis."""
    inputs, outputs = onnx_file.values(path)
    tensors = [*inputs, *outputs]
    batched = all(value.type.tensor_type.shape.dim[:1] and not onnx_file.size(value, 0) for value in tensors)
    made = [_spec(value, batched, dims, str(path)) for value in tensors]
    return tuple(made[: len(inputs)]), tuple(made[len(inputs) :])


def _spec(value: "ValueInfoProto", batched: bool, dims: Mapping[str, Dim], where: str) -> TensorSpec:
    from onnx import TensorProto, helper

    tensor = value.type.tensor_type
    made: list[int | Dim] = []
    for axis, dim in enumerate(tensor.shape.dim):
        name = dim.dim_param or f"{value.name}_{axis}"
        if size := onnx_file.size(value, axis):
            made.append(size)
        elif batched and axis == 0:
            made.append(dims.get("batch", BATCH))
        elif name in dims:
            made.append(dims[name])
        else:
            raise UsageError(
                f"the sizes of the dim {name} of {value.name} are not known",
                where=where,
                fix=f"say --dim {name}=SMALLEST,TYPICAL,LARGEST",
            )
    dtype = "object" if tensor.elem_type == TensorProto.STRING else helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(value.name, str(dtype), tuple(made))
