"""Source: what `serve add` publishes: an ONNX file, a bundle of `optimize`, or a version of another repository."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelathe.errors import UsageError
from modelathe.tensors import BATCH, TRITON_DTYPES, UNBATCHED, UNBOUNDED, Dim, TensorSpec
from serve.config.errors import BadRepository
from serve.config.target import Target
from serve.repository import onnx_file
from serve.repository import tree as repository

if TYPE_CHECKING:
    from onnx import ValueInfoProto

BUNDLE = "bundle.json"
NO_AXIS = "none"
WRITTEN = (
    *("model", "number", "inputs", "outputs", "kept", "target", "serve", "config", "digests", "proof"),
    *("lived", "failed"),
)
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
        page: its proof, where it has one.
    """

    onnx: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    name: str = ""
    target: Target | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    page: Path | None = None


def load(path: Path, dims: Mapping[str, Dim], axis: str = "") -> Source:
    """Return what `path` holds.

    Args:
        path: an ONNX file, the folder of a bundle, or that of a version with a lineage.
        dims: ranges of the dims that change size, by their names in the graph.
        axis: the graph's name of the batch axis, or `NO_AXIS`. Without it, the first dim is the batch axis where that
            of every input and output changes size.

    Raises:
        BadRepository: there is nothing of that kind, or its files changed after they were written.
        UsageError: the range of a dim is not known, one is given that would not be used, or `axis` is not the first
            dim of every input and output.
    """
    if repository.published(path):
        if axis:
            fix = "leave --batch-axis away, or add the model's file again"
            raise UsageError("the batch axis of a version stays as it is", where=str(path), fix=fix)
        found = _from_version(path)
    elif (path / BUNDLE).is_file():
        found = _from_bundle(path, dims, axis)
    elif path.is_file():
        inputs, outputs = _specs(path, dims, axis)
        found = Source(path, inputs, outputs, lineage=_origin(path, path))
    else:
        raise BadRepository(
            "is no model", where=str(path), fix="give an ONNX file, a bundle of optimize, or a version's folder"
        )
    used = {dim for spec in (*found.inputs, *found.outputs) for dim in spec.dims if isinstance(dim, Dim)}
    used |= {replace(dim, name=BATCH.name) for dim in used if dim.name == UNBATCHED}
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
    told = {**own, **_origin(path, onnx)}
    return Source(onnx, inputs, outputs, model, target, lineage.get("serve", {}), told, repository.page(path))


def _from_bundle(path: Path, dims: Mapping[str, Dim], axis: str) -> Source:
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
    inputs, outputs = _specs(onnx, {**ranges, **dims}, axis)
    values = {spec.name: spec.values for spec in known}
    inputs = tuple(replace(spec, values=values.get(spec.name)) for spec in inputs)
    return Source(onnx, inputs, outputs, name, lineage={"lineage": history, **_origin(path, onnx)})


def _origin(path: Path, onnx: Path) -> dict[str, Any]:
    return {"source": {"path": str(path.absolute()), "digest": repository.digest(onnx)}}


def _specs(path: Path, dims: Mapping[str, Dim], axis: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the specs of an ONNX file; arguments as in `load`."""
    inputs, outputs = onnx_file.values(path)
    tensors = [*inputs, *outputs]
    free = all(value.type.tensor_type.shape.dim[:1] and not onnx_file.size(value, 0) for value in tensors)
    if axis not in ("", NO_AXIS) and not (free and axis in {_name(value, 0) for value in tensors}):
        raise UsageError(
            f"--batch-axis {axis}: it is not the first dim of every input and output, and Triton batches no other",
            where=str(path),
            fix=f"say --batch-axis {NO_AXIS}, or export the model with this dim first everywhere",
        )
    batch = dims.get("batch", BATCH) if free and axis != NO_AXIS else None
    found = tuple(_spec(value, batch, dims, str(path)) for value in inputs)
    return found, tuple(_spec(value, batch, {**_open(value), **dims}, str(path)) for value in outputs)


def _name(value: "ValueInfoProto", axis: int) -> str:
    """Return the name of a dim that changes size."""
    return value.type.tensor_type.shape.dim[axis].dim_param or f"{value.name}_{axis}"


def _open(value: "ValueInfoProto") -> dict[str, Dim]:
    """Return the dims of an output: how large they can become need not be known."""
    return {name: Dim(name, 1, 1, UNBOUNDED) for name in map(partial(_name, value), range(_rank(value)))}


def _rank(value: "ValueInfoProto") -> int:
    return len(value.type.tensor_type.shape.dim)


def _spec(value: "ValueInfoProto", batch: Dim | None, dims: Mapping[str, Dim], where: str) -> TensorSpec:
    """Return the spec of an input or output, whose first dim is `batch` where there is one."""
    from onnx import TensorProto, helper

    made: list[int | Dim] = []
    for axis in range(_rank(value)):
        name = _name(value, axis)
        if size := onnx_file.size(value, axis):
            made.append(size)
        elif batch and axis == 0:
            made.append(batch)
        elif name in dims:
            made.append(dims[name])
        else:
            raise UsageError(
                f"the sizes of the dim {name} of {value.name} are not known",
                where=where,
                fix=f"say --dim {name}=SMALLEST,TYPICAL,LARGEST",
            )
    kind = value.type.tensor_type.elem_type
    dtype = "object" if kind == TensorProto.STRING else str(helper.tensor_dtype_to_np_dtype(kind))
    if dtype not in TRITON_DTYPES:
        raise BadRepository(
            f"{value.name} is {dtype}, which no request or answer carries here",
            where=where,
            fix="export the model with a Cast beside it, from or to float32 or an integer of 8 bits or more",
        )
    spec = TensorSpec(value.name, dtype, tuple(made))
    return spec if batch else spec.unbatched
